"""Start a run in a new folder, take one up where it was left, or evaluate what it reached."""

import logging
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastcnn.config import Config, PlaceConfig, options_by_name
from fastcnn.data.images import LeftOut
from fastcnn.errors import CheckpointError, DataError, NumbersError, UsageError
from fastcnn.files import remove_leftovers
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import feed, open_trained
from fastcnn.train.checkpoints.space import check_space
from fastcnn.train.checkpoints.validate_resume import check_history, validate_resume
from fastcnn.train.distributed import Distributed, joined, require_same
from fastcnn.train.evaluate import evaluate
from fastcnn.train.host import tune_process
from fastcnn.train.loggers import check_loggers
from fastcnn.train.loop import Training
from fastcnn.train.numerics.precision import choose_device
from fastcnn.train.progress import Progress
from fastcnn.train.rundir import BAD_IMAGES, RunFolder, versions
from fastcnn.train.setup import Setup, prepare

log = logging.getLogger(__name__)

DEV_RUN = "fastcnn-dev-run"  # what temporary folders are called

# options that change neither the order of the data nor the arithmetic a step asks for
NEUTRAL_ON_RESUME = {
    "device",
    "backend",
    "conv",
    "graph",
    "threads",
    "workers",
    "checkpoint_steps",
    "keep_checkpoints",
    "eval_batch_size",
    # whatever they leave out, a run goes on with the images it began with, or not at all
    "on_bad_image",
    "bad_limit",
    "loggers",
}
# options that the rest of a run can do with another value of, if its user says so
CHANGEABLE_ON_RESUME = {
    "epochs",
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "schedule",
    "warmup_epochs",
    "step_epochs",
    "milestones",
    "gamma",
    "final_lr",
    "time_decay",
    "label_smoothing",
    "precise_bn",
    "test_flip",
    "mixup",
    "cutmix",
    "clip_grad",
    "early_stop",
    "crop_padding",
    "crop_mode",
    "flip",
    "rotation",
    "shift",
    "cutout",
    "resized_crop",
    "color_jitter",
    "loader",
    "store",
}


@dataclass(frozen=True)
class Outcome:
    """Where a run is and what it reached."""

    folder: RunFolder
    summary: dict[str, Any]


def start(config: Config, place: PlaceConfig, command: list[str], quiet: bool = False) -> Outcome:
    """Train `config` in a new run folder; `command` is recorded in environment.json.

    With `fast_dev_run` the folder is a temporary one, left to the system to clear away, unless
    `place` names another.
    """
    temporary = config.run.fast_dev_run and place == PlaceConfig()
    with joined() as ranks:
        if ranks.first:
            RunFolder.check_name(place)
        check_loggers(config.run.loggers)
        tune_process(config.run.threads, ranks.local_world)
        setup = prepared(config, ranks)
        if ranks.first:
            wanted = Path(place.output) / (place.name or "")
            check_space(Path(tempfile.gettempdir()) / DEV_RUN if temporary else wanted, setup)
            if temporary:
                place = replace(place, output=tempfile.mkdtemp(prefix=f"{DEV_RUN}-"))
        own = RunFolder.create(place, config.model.arch) if ranks.first else None
        path, *_ = ranks.all_gather_object(str(own.path) if own else "")
        folder = own or RunFolder(Path(path), writes=False)
        with folder.claimed():
            training = Training(setup, folder, quiet)
            folder.write_start(setup.config, command)
            folder.write_bad_images(setup.dataset.left_out.bad)
            announce(training)
            return Outcome(folder, training.train())


def prepared(config: Config, ranks: Distributed) -> Setup:
    """What a run needs; raises UsageError where the ranks would not train the same."""
    # by these they know, each for itself, whether they are to agree on a number format
    told = ("amp", "amp_dtype")
    require_same(ranks, {options_by_name()[name].flag: getattr(config.run, name) for name in told})
    setup = prepare(config, ranks)
    own = {"device"}  # of each machine
    options = {f"--{k.replace('_', '-')}": v for k, v in config.flat().items() if k not in own}
    facts = {"images": setup.identity()["data"], "versions": versions()}
    chosen = {"backend": setup.backend, "precision": setup.precision.name}
    require_same(ranks, options | facts | chosen)
    return setup


def resume(
    place: PlaceConfig, explicit: dict[str, Any], command: list[str], quiet: bool = False
) -> Outcome:
    """Continue the run in `place.resume`, a run folder, or go back to an older checkpoint, a file
    in one; `explicit` are the options given beside it.

    Raises CheckpointError if there is nothing to continue, UsageError if `explicit` contradicts
    the saved configuration without `place.allow_changes`, or where another process has the run.
    """
    target = Path(place.resume or "")
    named = target.suffix == ".pt" and not target.is_dir()
    with joined() as ranks:
        folder = RunFolder.open(target.parent if named else target)
        folder.writes = ranks.first
        with folder.claimed():
            source = target if named else None
            return _resume(folder, source, place.allow_changes, explicit, command, quiet, ranks)


def _resume(
    folder: RunFolder,
    named: Path | None,
    allow_changes: bool,
    explicit: dict[str, Any],
    command: list[str],
    quiet: bool,
    ranks: Distributed,
) -> Outcome:
    if ranks.first:
        remove_leftovers(folder.path)
    source = named or folder.last
    # a run killed before its first checkpoint begins anew in its folder
    begun = named is not None or source.exists() or any(checkpoint.formers(source))
    state = checkpoint.load(source) if begun else None
    written = folder.read_config()
    saved = saved_config(state, source) if state else written
    config = changed_config(saved, written.flat() | explicit, allow_changes)
    summary = folder.read_summary()
    # of a finished run too, who names a checkpoint wants to go on from it
    whole = state is None or has_tables(folder, state)
    if (
        summary is not None
        and whole
        and result_options(config) == result_options(saved)
        and not named
    ):
        Progress(0, 0, quiet or not ranks.first).say(
            f"{folder.path} is finished: nothing to continue"
        )
        return Outcome(folder, summary)
    check_loggers(config.run.loggers)
    tune_process(config.run.threads, ranks.local_world)
    setup = prepared(config, ranks)
    if ranks.first:
        check_space(folder.path, setup)
    training = Training(setup, folder, quiet)
    if state is not None:
        try:
            training.restore(state, source)
            validate_resume(training)
        except (CheckpointError, DataError, OverflowError) as error:
            told = str(error)  # parts of a training know no file
            raise CheckpointError(told if str(source) in told else f"{source}: {told}") from error
        if ranks.first and (source != folder.last or not checkpoint.has_sum(folder.last)):
            # before anything is saved: what was newer must not take the place of a whole one
            checkpoint.save(state, folder.last)
    folder.write_resumption(setup.config, command)
    # as the checkpoint knows them: the file may be damaged, or tell of epochs gone back on
    folder.write_metrics(training.state.history)
    folder.write_bad_images(training.setup.dataset.left_out.bad)
    announce(training)
    return Outcome(folder, training.train())


def has_tables(folder: RunFolder, state: dict[str, Any]) -> bool:
    """Whether a run has the tables that its last checkpoint, were it finished, could bring back."""
    try:
        history = state["progress"]["history"]
        check_history(history)
    except (KeyError, TypeError, CheckpointError):
        return False  # who takes the checkpoint up is told what is wrong with it
    return folder.has_tables(history)


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """The configuration in a checkpoint; raises CheckpointError if it holds none that is valid."""
    try:
        return Config.from_flat(state["config"])
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path}: holds no valid configuration ({error})") from error


def result_options(config: Config) -> dict[str, Any]:
    """The options that decide what a run arrives at."""
    return {k: v for k, v in config.flat().items() if k not in NEUTRAL_ON_RESUME}


def as_decided(wanted: dict[str, Any], saved: Config) -> dict[str, Any]:
    """The options with what a run has decided on in the place of what is left open to it."""
    if wanted.get("amp_dtype") != "auto":
        return wanted
    return wanted | {"amp_dtype": saved.run.amp_dtype}


def changed_config(saved: Config, wanted: dict[str, Any], allow: bool) -> Config:
    """The configuration with the options given anew, if these may differ from the saved ones.

    Raises UsageError for a difference that is not asked for by `allow`, or that no run could go on
    with.
    """
    before, after = saved.flat(), Config.from_flat(as_decided(wanted, saved))
    changes = {k: v for k, v in result_options(after).items() if v != before[k]}
    listed = "; ".join(f"{name}: {before[name]} → {value}" for name, value in changes.items())
    if changes and not allow:
        raise UsageError(f"--resume: options differ from the run's ({listed}); add --allow-changes")
    if stuck := [name for name in changes if name not in CHANGEABLE_ON_RESUME]:
        raise UsageError(f"--resume: {', '.join(stuck)} cannot change in mid-run; start a new run")
    return after


def evaluate_run(
    target: str,
    data: str | None = None,
    split_name: str = "test",
    weights: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a run folder or a checkpoint file; `overrides` are options by name.

    `weights` is "last" or "best"; None takes the model that the run's summary speaks of.
    Returns top1, top5 (fractions), loss, images, images_per_s, seconds and what was evaluated.
    """
    options = overrides or {}
    tune_process(options.get("threads"))
    device = choose_device(options.get("device", "auto"))
    trained = open_trained(target, device, options.get("backend", "auto"), weights)
    own = feed(trained, device, data, split_name, options)
    loss = trained.config.optim.loss
    result = evaluate(
        trained.model, own.loader, len(trained.classes), own.precision, device, own.flip, loss
    )
    if not math.isfinite(result.figures.loss):
        raise NumbersError(f"{trained.path}: the loss is {result.figures.loss}: broken weights")
    return {
        "arch": trained.config.model.arch,
        "checkpoint": str(trained.path),
        "data": own.dataset.name,
        "split": split_name,
        "images": result.figures.images,
        "bad_images": len(own.dataset.left_out.bad),
        "grey_images_dropped": own.dataset.left_out.grey,
        "top1": result.figures.top1,
        "top5": result.figures.top5,
        "loss": result.figures.loss,
        "test_flip": own.flip,
        "seconds": result.seconds,
        "images_per_s": result.images_per_s,
        "device": str(device),
        "precision": own.precision.name,
        "backend": own.backend,
    }


def announce(training: Training) -> None:
    """Say what was decided before the first step."""
    setup, progress = training.setup, training.progress
    config, sizes = setup.config, setup.identity()["data"]["sizes"]
    images = ", ".join(f"{count:,} {name}" for name, count in sizes.items())
    progress.say(
        f"{setup.network.name} on {setup.dataset.name} ({images} images, "
        f"{setup.image_size}x{setup.image_size}, {setup.classes} classes)"
    )
    if left_out := describe_left_out(setup.dataset.left_out):
        progress.say(left_out)
    progress.say(
        f"device {setup.device_name}, {setup.precision.name}, backend {setup.backend}, "
        f"loader {setup.dataset.loader}, recipe {config.run.recipe}, seed {config.run.seed}"
    )
    if setup.dataset.why:
        progress.say(setup.dataset.why)
    for note in setup.notes:
        progress.say(f"note: {note}")
    if training.precise:
        progress.say(
            f"note: {training.step.steps_per_epoch} steps an epoch: batch norm's running "
            "statistics are taken anew before each evaluation (--precise-bn)"
        )
    where = f"run folder {training.folder.path}"
    if training.step.step:
        where += f", continued at epoch {training.state.epoch + 1}, step {training.step.step}"
    progress.say(where)


def describe_left_out(left_out: LeftOut) -> str:
    """Say how many images were left out; "" if none."""
    parts = []
    if left_out.bad:
        parts.append(f"{len(left_out.bad):,} unreadable (see {BAD_IMAGES})")
    if left_out.grey:
        parts.append(f"{left_out.grey:,} grey")
    return f"images left out: {', '.join(parts)}" if parts else ""
