"""Disturb trainings for hours and see that they end as undisturbed ones do, bit for bit.

    python tests/soak.py --hours 2 --folder F [--seed 0]

Small networks are trained on the digits by `fastcnn train`, a few configurations in turn: each once
undisturbed, then again and again with signals, full disks and damaged files at random moments, and
resumed after each as its message says, until the run is finished. Weights, optimiser, averages,
generators, metrics and test figures must then be those of the undisturbed run; no file and no
process may be left over, and every exit code be the documented one. The first mismatch ends the
script with exit code 1 and stays in F for a look.

F/log.jsonl has every event; F/state.json says where to go on: a script that was stopped, however,
is started again with the same words. `--seconds 30` tries it.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from soaking import training
from soaking.compare import differences
from soaking.damage import DAMAGES, damage
from soaking.training import CODES, DISTURBANCES, Stuck

COMMON = (
    "--data digits --backend torch --threads 1 --device cpu --test-subset 40 --batch-size 16 "
    "--eval-batch-size 40 --checkpoint-steps 3 --keep-checkpoints 3"
)
CONFIGURATIONS = {
    "dropout": "--arch cnn-a --train-subset 96 --epochs 3",
    "averaged": "--arch murgolo-improved --train-subset 320 --epochs 12 --ema 0.9 "
    "--optimizer adam --val-fraction 0.25 --restore-best",
    "workers": "--arch murgolo-improved --train-subset 256 --epochs 8 --loader torch --workers 2 "
    "--rotation 10",
    "mixed": "--arch mao-batchnorm --train-subset 160 --epochs 5 --loader resident --mixup 0.4 "
    "--cutmix 1",
}
MOST = 8  # disturbances of a run; then it is left alone
DAMAGED = 0.5  # of the starts
SHARE = 0.4  # of an undisturbed run's time, that it is behind its first checkpoint


class Event(NamedTuple):
    """What happens to a run: damage before a start, "" for none; a disturbance at a moment of it,
    as a share of the time that an undisturbed run takes: from the start on, or, with `training`,
    from the next checkpoint."""

    damage: str = ""
    disturbance: str = "none"
    moment: float = 0.0
    training: bool = False


@dataclass
class State:
    """Where the soak stands, as state.json keeps it. counts: of everything that the log tells."""

    round: int = 0
    event: int = 0
    next: str = ""  # the checkpoint to name at the next start
    seconds: dict[str, float] = field(default_factory=dict)  # of undisturbed runs
    counts: dict[str, int] = field(default_factory=dict)
    mismatch: str = ""


class Soak:
    """A folder with its log and state."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state.json"
        self.state = State(**json.loads(path.read_text())) if path.is_file() else State()

    def keep(self) -> None:
        path = self.folder / "state.json"
        written = path.with_suffix(".new")
        written.write_text(json.dumps(vars(self.state), indent=1) + "\n")
        written.replace(path)

    def log(self, event: str, **told: Any) -> None:
        counts = self.state.counts
        counts[event] = counts.get(event, 0) + 1
        line = {"time": time.strftime("%F %T"), "round": self.state.round, "event": event, **told}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.keep()

    def fail(self, why: str) -> None:
        self.state.mismatch = why
        self.log("mismatch", why=why)

    def reference(self, name: str) -> Path:
        """The undisturbed run of a configuration."""
        path = self.folder / "undisturbed" / name
        if name not in self.state.seconds:
            shutil.rmtree(path, ignore_errors=True)
            ended = training.run(self.words(path, name))
            if ended.code != 0:
                raise Stuck(f"the undisturbed run ended with {ended.code}: {ended.words}")
            self.state.seconds[name] = ended.seconds
            self.log("undisturbed run", configuration=name, seconds=round(ended.seconds, 1))
        return path

    def words(self, path: Path, name: str) -> list[str]:
        place = ["--output", str(path.parent), "--name", path.name]
        return [*COMMON.split(), *CONFIGURATIONS[name].split(), *place]

    def events(self) -> Iterator[Event]:
        """What happens to this round's run, from where the state says."""
        for number in range(self.state.event, MOST):
            random = Random(f"{self.seed} {self.state.round} {number}")
            damaged = random.choice([*DAMAGES]) if random.random() < DAMAGED else ""
            disturbed = random.choice([name for name in DISTURBANCES if name != "none"])
            training = random.random() < 0.5
            moment = random.random() * (SHARE if training else 1)
            yield Event(damaged, disturbed, moment, training)

    def round(self, name: str, events: Iterator[Event]) -> bool:
        """Train a configuration through `events` to its end; whether it ended as it should."""
        whole = self.reference(name)
        path = self.folder / "disturbed" / name
        given = iter(events)
        while True:
            event = next(given, Event())
            if self.start(name, path, event):
                break
            self.state.event += 1
            self.keep()
        if found := differences(whole, path):
            self.fail(f"{path} differs from {whole}: {'; '.join(found[:5])}")
            return False
        self.log("run like the undisturbed one", configuration=name)
        shutil.rmtree(path)
        self.state.round, self.state.event, self.state.next = self.state.round + 1, 0, ""
        self.keep()
        return True

    def start(self, name: str, path: Path, event: Event) -> bool:
        """Start or resume the run, with what happens to it; whether it is finished."""
        state = self.state
        seed = f"{self.seed} {state.round} {state.event}"
        if event.damage and damage(path, event.damage, Random(seed)):
            self.log("damage", kind=event.damage)
        words = ["--resume", state.next or str(path)] if path.exists() else self.words(path, name)
        moment = event.moment * state.seconds[name]
        awaited = path / "last.pt" if event.training else None
        ended = training.run(words, event.disturbance, moment, awaited, seed)
        told = {
            "training": event.training,
            "code": ended.code,
            "seconds": round(ended.seconds, 1),
            "said": ended.words,
        }
        self.log(event.disturbance, moment=round(moment, 1), resumed=words[0] == "--resume", **told)
        if ended.code == 0:
            return True
        state.next = ""
        if ended.code in (2, 4):
            kind, target = training.way_on(path, ended.words)
            state.next = str(target or "")
            self.log(kind)
        elif ended.code not in CODES[event.disturbance]:
            raise Stuck(f"{event.disturbance}: exit code {ended.code}: {ended.words}")
        return False

    def run(self, seconds: float) -> bool:
        """Round after round until the time is up; whether all is well."""
        end = time.monotonic() + seconds
        names = [*CONFIGURATIONS]
        while not self.state.mismatch and time.monotonic() < end:
            name = names[self.state.round % len(names)]
            try:
                self.round(name, self.events())
            except Stuck as error:
                self.fail(str(error))
        return not self.state.mismatch

    def summary(self) -> str:
        counts = Counter(self.state.counts)
        lines = [f"{name}: {count:,}" for name, count in sorted(counts.items())]
        return "\n".join(
            [f"rounds: {self.state.round:,}", *lines, *filter(None, [self.state.mismatch])]
        )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, help="in the place of --hours")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    soak = Soak(given.folder, given.seed)
    well = soak.run(given.seconds if given.seconds is not None else 3600 * given.hours)
    print(soak.summary())
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
