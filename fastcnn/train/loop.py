"""The epochs of a run: train, evaluate, record, save; interruption and resumption."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastcnn.archs.spec import parameters
from fastcnn.data.draws import derive_seed
from fastcnn.data.loaders import Loader
from fastcnn.errors import CheckpointError, NumbersError, UsageError
from fastcnn.ops import conv_autotune
from fastcnn.ops.gpu_faults import require_alive
from fastcnn.text import first_line
from fastcnn.train import memory
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import load_trained
from fastcnn.train.checkpoints.saver import Saver
from fastcnn.train.distributed import AGREE_STEPS
from fastcnn.train.evaluate import Evaluation, Evaluator
from fastcnn.train.graph import GraphMode
from fastcnn.train.interrupt import Interrupted, StopAtStepEdge
from fastcnn.train.loggers import Loggers
from fastcnn.train.metrics import Figures
from fastcnn.train.numerics.diagnose import first_not_finite
from fastcnn.train.numerics.guard import LIMIT
from fastcnn.train.numerics.precise_bn import PreciseBatchNorm, batches_of, wanted
from fastcnn.train.numerics.statistics import statistics
from fastcnn.train.progress import Progress, format_seconds
from fastcnn.train.rundir import RunFolder, versions
from fastcnn.train.setup import Setup
from fastcnn.train.step import TrainStep

DONE = object()
BRIEF = 48  # characters of a value in a message


@dataclass
class TrainState:
    """How far a run has come. `trained`: the epoch's steps are done, its evaluation is not."""

    epoch: int = 0
    trained: bool = False
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_value: float | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for what a forged checkpoint may hold in the place of numbers."""
        counts = {type(self.epoch), type(self.best_epoch)}
        times = (self.seconds, self.best_value or 0.0)
        if counts != {int} or not all(isinstance(one, int | float) for one in times):
            raise TypeError("epochs and seconds are no numbers")


def new_step(setup: Setup) -> TrainStep:
    """The step of a run, before its first one."""
    config = setup.config
    return TrainStep(
        setup.model,
        config.optim,
        setup.precision,
        len(setup.train_loader),
        config.run.seed,
        setup.device,
        graph=graph_mode(setup),
        backend=setup.backend,
        ranks=setup.ranks,
        last_weight=setup.train_loader.last_weight,
    )


def graph_mode(setup: Setup) -> GraphMode:
    """Whether steps become graphs: of several ranks, whose exchange cannot always be captured, only
    where that is asked for."""
    mode = setup.config.run.graph
    return "off" if mode == "auto" and setup.ranks.world > 1 else mode


def new_precise_bn(setup: Setup, step: TrainStep) -> PreciseBatchNorm | None:
    """What takes the statistics of the evaluated model anew, where --precise-bn applies."""
    few = wanted(setup.config.optim.precise_bn, step.steps_per_epoch)
    if not few or not setup.network.has_norm:
        return None
    return PreciseBatchNorm(step.evaluated_model, setup.precision.dtype, setup.ranks)


def new_evaluator(setup: Setup, step: TrainStep, loader: Any) -> Evaluator:
    """What evaluates the model of `step` whose accuracy counts, on `loader`."""
    return Evaluator(
        step.evaluated_model,
        loader,
        setup.classes,
        setup.precision,
        setup.device,
        setup.config.optim.test_flip,
        step.replay.recorder,
        step.replay.required,
        setup.config.optim.loss,
        setup.ranks,
    )


class Training:
    """A run in its folder: `train()` carries it from where it stands to its end."""

    def __init__(self, setup: Setup, folder: RunFolder, quiet: bool = False):
        config = setup.config
        self.setup, self.folder = setup, folder
        self.epochs = 1 if config.run.fast_dev_run else config.optim.epochs
        self.ranks = ranks = setup.ranks
        steps = len(setup.train_loader)
        self.progress = Progress(self.epochs, steps, quiet or not ranks.first, ranks.world)
        self.step = new_step(setup)
        self.precise = new_precise_bn(setup, self.step)
        self._rngs: list[dict[str, Any]] = []
        self._evaluators: dict[int, Evaluator] = {}
        self._told_plans = False
        self.state = TrainState()

    def train(self) -> dict[str, Any]:
        """Run the remaining epochs and return the summary; raises Interrupted with all saved."""
        evaluation = None
        writes = self.folder.writes
        loggers = Loggers(self.setup.config, self.folder.path, self.state.history, writes)
        # a logger may wait for its network when it is closed: then Ctrl-C ends at once
        with loggers as self.loggers, StopAtStepEdge() as stop, Saver(writes) as self.saver:
            try:
                self._gather()
                while self.state.epoch < self.epochs and not self._stopped_improving():
                    if not self.state.trained:
                        self._train_epoch(stop)
                    evaluation = self._finish_epoch(stop)
                self.saver.wait()
                summary = self._finish(evaluation, stop)
                self.ranks.barrier()
                return summary
            except Interrupted:
                self._save()
                self.saver.wait()
                self.ranks.stopped()
                raise

    def _train_epoch(self, stop: StopAtStepEdge) -> None:
        setup, every = self.setup, self.setup.config.run.checkpoint_steps
        steps_done = self.step.step - self.state.epoch * self.step.steps_per_epoch
        batch_size = setup.config.data.batch_size
        counted = self.step.metrics.read().images
        before, start = self.state.seconds, time.perf_counter()
        steps = self._telling_plans(self.step.epoch(setup.train_loader))
        shown = self.progress.epoch(self.state.epoch + 1, steps_done, batch_size, counted)
        with shown as bar, self._advising("--batch-size", batch_size), closing(steps):
            for _ in steps:
                bar.update(self.step.metrics)
                self.state.seconds = before + time.perf_counter() - start
                due = bool(every) and self.step.step % every == 0
                if self._check_stop(stop, due):
                    break
                if due:
                    self._gather()
                    self._save()
                if setup.config.run.fast_dev_run:
                    break
        self._require_numbers()
        self._gather()
        self.state.seconds = before + time.perf_counter() - start
        self.state.trained = True

    def _check_stop(self, stop: StopAtStepEdge, due: bool) -> bool:
        """Whether a step has ended the training; raises Interrupted where a signal has come."""
        if not due and not self._is_sync_step(self.step.step):
            return False
        ended = self.step.guard.ended(wait=due)
        try:
            return self._sync_stop(stop, ended)
        except Interrupted:
            self._gather()
            raise

    def _is_sync_step(self, number: int) -> bool:
        """Whether ranks look at each other's signals after their batch `number`."""
        on_gpu = self.setup.device.type == "cuda"
        return self.ranks.world == 1 or not on_gpu or number % AGREE_STEPS == 0

    def _sync_stop(self, stop: StopAtStepEdge, ended: bool = False) -> bool:
        """Whether `ended` on any rank; raises Interrupted where a signal has come to any.

        Ranks decide together, at batches that all of them come to: a signal to one of them is heard
        by all, and none is left waiting for the others. One that comes meanwhile waits.
        """
        requested, over = self.ranks.all_reduce_max(stop.requested, ended)
        if requested:
            stop.note(requested)
        if requested or self.ranks.world == 1:
            stop.check()
        return bool(over)

    def _stop_checker(self, loader: Loader, stop: StopAtStepEdge) -> Callable[[], None]:
        """What looks for signals after each batch of an evaluation that all ranks come to."""
        done = itertools.count(1)

        def look() -> None:
            number = next(done)
            if number <= loader.common_batches and self._is_sync_step(number):
                self._sync_stop(stop)

        return look

    def _gather(self) -> Figures:
        """Bring together what the ranks have of the epoch: rank 0 has all of it from then on, and
        saves it. Return the figures so far."""
        states = checkpoint.rng_state(self.setup.device)
        each = {name: self.ranks.all_gather(state.cpu()) for name, state in states.items()}
        self._rngs = [
            {name: found[rank] for name, found in each.items()} for rank in range(self.ranks.world)
        ]
        return self.step.metrics.gather(self.ranks)

    def _telling_plans(self, steps: Iterator[None]) -> Generator[None]:
        """The steps; after the first of the run, say how many of its convolutions are fused."""
        if not self._told_plans:
            with conv_autotune.noted() as taken:
                if next(steps, DONE) is DONE:
                    return
            self._told_plans = True
            if line := conv_autotune.summary(taken, self.setup.device):
                self.progress.say(line)
            yield
        yield from steps

    def _finish_epoch(self, stop: StopAtStepEdge) -> Evaluation:
        """Evaluate the epoch just trained, record it, save."""
        trained = self._gather()
        self._require_finite(trained.loss, "training loss")
        start = time.perf_counter()
        self._take_statistics(stop)
        evaluation = self._evaluate(self.setup.val_loader, stop)
        seconds = time.perf_counter() - start
        self._require_finite(evaluation.figures.loss, "validation loss")
        self._record(trained, evaluation.figures, seconds)
        self.state.epoch += 1
        self.state.trained, self.state.seconds = False, 0.0
        self.step.metrics.reset()
        self.step.guard.reset()
        self.folder.write_metrics(self.state.history)
        if self.state.best_epoch == self.state.epoch:
            self._save_best()
        self._save()
        self.loggers.epoch(self.state.history[-1])
        return evaluation

    def _take_statistics(self, stop: StopAtStepEdge) -> None:
        """Take the evaluated model's running statistics anew, where --precise-bn applies."""
        if self.precise:
            loader, config = self.setup.train_loader, self.setup.config
            batches = 1 if config.run.fast_dev_run else batches_of(loader)
            # closed at once, or an interruption would save the position inside
            with (
                self._advising("--batch-size", config.data.batch_size),
                closing(loader.ahead(batches)) as ahead,
            ):
                self.precise(ahead, self._stop_checker(loader, stop))

    def _evaluate(self, loader: Loader, stop: StopAtStepEdge) -> Evaluation:
        """Evaluate the model whose accuracy counts; the graphs are kept for the next epoch."""
        setup = self.setup
        if id(loader) not in self._evaluators:
            self._evaluators[id(loader)] = new_evaluator(setup, self.step, loader)
        # without --sync-norm each rank has its own; as in DistributedDataParallel, those of one
        # count
        self.ranks.broadcast(*statistics(self.step.evaluated_model))
        batches = 1 if setup.config.run.fast_dev_run else None
        with self._advising("--eval-batch-size", setup.config.data.eval_batch_size):
            return self._evaluators[id(loader)](self._stop_checker(loader, stop), batches)

    def _advising(self, option: str, batch_size: int) -> AbstractContextManager[None]:
        return memory.advising(option, batch_size, self.setup.device, self._kept)

    def _record(self, trained: Figures, figures: Figures, seconds: float) -> None:
        """Note an epoch; `seconds`: of its evaluation."""
        last_step = self.step.step - 1
        row: dict[str, Any] = {
            "epoch": self.state.epoch + 1,
            "train_loss": trained.loss,
            "train_top1": trained.top1,
            "val_loss": figures.loss,
            "val_top1": figures.top1,
            "val_top5": figures.top5,
            "lr": self.step.lr_of(last_step),
            "skipped_steps": self.step.guard.skipped(),
            "images_per_s": trained.images / max(self.state.seconds, 1e-9),
            "seconds": self.state.seconds + seconds,
        }
        self.state.history.append(row)
        metric = self.setup.config.optim.best_metric
        value = row[metric] if metric == "val_top1" else -row[metric]
        if self.state.best_value is None or value > self.state.best_value:
            self.state.best_value, self.state.best_epoch = value, row["epoch"]
        self.progress.say(self._line(row))

    def _line(self, row: dict[str, Any]) -> str:
        left = sum(r["seconds"] for r in self.state.history) / len(self.state.history)
        left *= self.epochs - row["epoch"]
        rest = f"  {format_seconds(left)} left" if left else ""
        if skipped := row["skipped_steps"]:
            rest += f"  {skipped} step{'s' if skipped > 1 else ''} skipped"
        return (
            f"epoch {row['epoch']}/{self.epochs}  train loss {row['train_loss']:.4f} "
            f"top-1 {row['train_top1']:.2%}  val loss {row['val_loss']:.4f} "
            f"top-1 {row['val_top1']:.2%} top-5 {row['val_top5']:.2%}  "
            f"{row['images_per_s']:,.0f} images/s{rest}"
        )

    def _stopped_improving(self) -> bool:
        patience = self.setup.config.optim.early_stop
        return bool(patience) and self.state.epoch - self.state.best_epoch >= patience

    def _require_numbers(self) -> None:
        """Raise NumbersError where a step had gradients that the run cannot go on with."""
        guard, loader = self.step.guard, self.setup.train_loader
        if not guard.ended():
            return
        if guard.scale is None:
            position = self.step.metrics.batches()
            number = self.state.epoch * self.step.steps_per_epoch + position + 1
            place, remedy = f"step {number} (epoch {self.state.epoch + 1})", ""
            what = "is not finite"
        else:
            position = (self.step.step - 1) % self.step.steps_per_epoch
            place = f"epoch {self.state.epoch + 1}"
            what = (
                f"is not finite in fp16; {LIMIT} steps in a row were skipped and the loss scale "
                f"fell to {guard.scale.scale.item():g}"
            )
            remedy = ", or --amp-dtype bf16"
        where = first_not_finite(self.step, loader, self.state.epoch, position)
        raise NumbersError(
            f"{place}: {where} {what}: lower --lr or use --clip-grad 1{remedy}{self._kept()}"
        )

    def _kept(self) -> str:
        self.saver.wait()
        last = self.folder.last
        return f"; the last good checkpoint is {last}" if last.exists() else ""

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            epoch = min(self.state.epoch + 1, self.epochs)
            raise NumbersError(
                f"{what} is {value} in epoch {epoch}: lower --lr or use --clip-grad 1{self._kept()}"
            )

    def _finish(self, evaluation: Evaluation | None, stop: StopAtStepEdge) -> dict[str, Any]:
        """Test the model the run ends with, and write summary.json and the confusion counts."""
        setup = self.setup
        if setup.test_loader is not None:
            # a model of its own: an interruption here must save the one that was trained
            if setup.config.optim.restore_best:
                evaluation = self._evaluate_best(setup.test_loader, stop)
            else:
                evaluation = self._evaluate(setup.test_loader, stop)
        elif evaluation is None:
            evaluation = self._evaluate(setup.val_loader, stop)
        self._require_finite(evaluation.figures.loss, "test loss")
        summary = self._summary(evaluation)
        self.folder.write_confusion(evaluation.confusion, setup.dataset.classes)
        self.folder.write_summary(summary)
        self.loggers.finish(summary)
        return summary

    def _evaluate_best(self, loader: Loader, stop: StopAtStepEdge) -> Evaluation:
        setup = self.setup
        if self.ranks.first:
            model = load_trained(self.folder.best, setup.device, setup.backend).model
        else:
            model = copy.deepcopy(self.step.evaluated_model)
        self.ranks.broadcast(*model.state_dict().values())
        optim = setup.config.optim
        evaluator = Evaluator(
            model,
            loader,
            setup.classes,
            setup.precision,
            setup.device,
            optim.test_flip,
            loss=optim.loss,
            ranks=self.ranks,
        )
        return evaluator(self._stop_checker(loader, stop))

    def _summary(self, test: Evaluation) -> dict[str, Any]:
        setup, config, history = self.setup, self.setup.config, self.state.history
        best = config.optim.restore_best
        row = history[self.state.best_epoch - 1 if best else -1]
        trained_s = sum(r["seconds"] for r in history)
        identity = setup.identity()
        return {
            "arch": setup.network.name,
            "parameters": parameters(setup.network, setup.image_size, setup.classes),
            "data": setup.dataset.name,
            "images": identity["data"]["sizes"],
            "bad_images": len(setup.dataset.left_out.bad),
            "grey_images_dropped": setup.dataset.left_out.grey,
            "epochs": len(history),
            "best_epoch": self.state.best_epoch,
            "best_val_top1": max(r["val_top1"] for r in history),
            "tested_model": "best" if best else "last",
            "test_flip": config.optim.test_flip,
            "validation_images": "test" if setup.dataset.val is None else "val",
            "val_loss": row["val_loss"],
            "val_top1": row["val_top1"],
            "val_top5": row["val_top5"],
            "test_loss": test.figures.loss,
            "test_top1": test.figures.top1,
            "test_top5": test.figures.top5,
            "train_seconds": trained_s,
            "images_per_s": sum(r["images_per_s"] for r in history) / len(history),
            "backend": setup.backend,
            "loader": setup.dataset.loader,
            "device": setup.device_name,
            "amp": config.run.amp,
            "precision": setup.precision.name,
            "recipe": config.run.recipe,
            "seed": config.run.seed,
            "versions": versions(),
        }

    def _save_best(self) -> None:
        state = self.setup.identity()
        model = self.step.evaluated_model.state_dict()
        row = self.state.history[self.state.best_epoch - 1]
        state |= {"model": model, "epoch": self.state.best_epoch, "val": row}
        self.saver.save(state, self.folder.best)

    def _save(self) -> None:
        step = self.step
        self._require_numbers()
        trained = step.metrics.read()
        if trained.images:
            self._require_finite(trained.loss, "training loss")
        self._require_finite(largest_weight(step.model), "largest weight")
        state = {
            **self.setup.identity(),
            **step.state_dict(),
            "rng": self._rngs[0],
            "rng_of_ranks": self._rngs[1:],
            "steps_per_epoch": step.steps_per_epoch,
            "loader": self.setup.train_loader.state_dict(),
            "progress": vars(self.state) | {"history": [dict(row) for row in self.state.history]},
        }
        self.saver.save(state, self.folder.last, self.setup.config.run.keep_checkpoints)

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Take up a checkpoint of this very run, which was read from the file `source`.

        Raises CheckpointError if the data changed or an entry is missing or not what it should be.
        """
        if "model" in state and "optimizer" not in state:
            raise CheckpointError(
                f"{source}: holds weights alone, to evaluate and predict with; a run goes on from "
                f"its folder, {self.folder.path}"
            )
        try:
            self._restore(state, source)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            require_alive(self.setup.device, error, f"going on from {source}")
            raise CheckpointError(
                f"{source}: not a checkpoint that this run can go on from "
                f"({type(error).__name__}: {first_line(error)}); give an older one"
            ) from error

    def _restore(self, state: dict[str, Any], source: Path) -> None:
        identity = self.setup.identity()
        for name in ("network", "data"):
            if state[name] != identity[name]:
                changed = [
                    f"{key}: {brief(state[name].get(key))} → {brief(now)}"
                    for key, now in identity[name].items()
                    if state[name].get(key) != now
                ]
                raise CheckpointError(
                    f"{source}: the {name} changed since ({'; '.join(changed)}); "
                    "restore it, or start a new run"
                )
        step = self.step
        steps = state["steps_per_epoch"]
        if steps is not None and steps != step.steps_per_epoch:
            raise UsageError(
                f"--resume: an epoch had {steps} steps and has {step.steps_per_epoch} with "
                f"{self.ranks.world} processes, too many for its last batch; start as many as "
                "before"
            )
        step.load_state_dict(state, source)
        self.setup.train_loader.load_state_dict(state["loader"])
        self.state = TrainState(**state["progress"])
        self._restore_rng([state["rng"], *state["rng_of_ranks"]])
        if step.step > self.epochs * step.steps_per_epoch:
            raise UsageError(
                f"--epochs {self.epochs}: the run has trained for more already "
                f"({step.step / step.steps_per_epoch:.1f})"
            )

    def _restore_rng(self, saved: list[dict[str, Any]]) -> None:
        """Take up this rank's generators; a rank that there was none of begins with a new seed."""
        rank = self.ranks.rank
        if rank < len(saved):
            checkpoint.set_rng_state(saved[rank], self.setup.device)
        else:
            torch.manual_seed(derive_seed(self.setup.config.run.seed, "rank", rank, self.step.step))


def brief(value: Any) -> str:
    """A value in a few words, its end left out: a digest, or the names of many classes."""
    text = str(value)
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…"


def largest_weight(model: torch.nn.Module) -> float:
    """The largest absolute weight; nan or inf where one is not finite."""
    with torch.no_grad():
        return float(torch.stack([p.abs().max() for p in model.parameters()]).max())
