"""What a checkpoint at the end of every epoch costs, in turn with epochs that write none.

    python benchmarks/bench_checkpoint.py [--arch vgg16] [--data PATH] [--images 1000]
                                          [--rounds 5] [--json FILE]

Two trainings of one network on the same images take an epoch each in turn; one of them writes
last.pt and best.pt into a temporary folder. A turn is an epoch's steps, its evaluation and what of
the save holds them up; what is still being written at its end, which a run does beside the next
epoch, is waited for and told by itself. A save takes as long however many images an epoch has.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastcnn.bench.environment import environment
from fastcnn.recipes import resolve
from fastcnn.train.checkpoints.saver import Saver
from fastcnn.train.host import share_the_cores, tune_process
from fastcnn.train.interrupt import StopAtStepEdge
from fastcnn.train.loggers import Loggers
from fastcnn.train.loop import Training
from fastcnn.train.rundir import RunFolder
from fastcnn.train.setup import prepare


def main() -> None:
    options = arguments()
    share_the_cores()
    tune_process()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        writing = stack.enter_context(training(options, Path(folder), True))
        silent = stack.enter_context(training(options, Path(folder), False))
        turn(writing), turn(silent)  # libraries choose their algorithms
        rounds = [(turn(writing), turn(silent)) for _ in range(options.rounds)]
    found = figures(rounds) | {
        "data": Path(options.data).name,
        "arch": options.arch,
        "images": options.images,
    }
    print(told(found))
    if options.json:
        text = (
            json.dumps(
                {"environment": environment(torch.device("cpu")), "checkpoint": found}, indent=1
            )
            + "\n"
        )
        options.json.write_text(text, encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vgg16")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=1000, help="training images an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@contextlib.contextmanager
def training(options: argparse.Namespace, folder: Path, writes: bool) -> Iterator[Training]:
    chosen = {"arch": options.arch, "data": options.data, "train_subset": options.images}
    chosen |= {"test_subset": 100, "epochs": 1000}
    run = RunFolder(folder / str(writes), writes)
    run.path.mkdir()
    found = Training(prepare(resolve(chosen)), run, quiet=True)
    found.loggers = Loggers(found.setup.config, run.path, [], writes)
    with Saver(writes) as found.saver:
        yield found


def turn(one: Training) -> dict[str, float]:
    """Seconds of an epoch with its save, and of what was still to be written at its end."""
    start = time.perf_counter()
    with StopAtStepEdge() as stop:
        one._train_epoch(stop)
        one._finish_epoch(stop)
    epoch = time.perf_counter() - start
    one.saver.wait()
    return {"epoch": epoch, "save": time.perf_counter() - start - epoch}


def figures(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Seconds of all rounds and the cost of a save: what the writing turn took longer, in all."""
    spent = [writing["epoch"] + writing["save"] - silent["epoch"] for writing, silent in rounds]
    plain = statistics.median(silent["epoch"] for _, silent in rounds)
    held = [writing["epoch"] / silent["epoch"] for writing, silent in rounds]
    return {
        "rounds": rounds,
        "epoch_s": plain,
        "save_s": statistics.median(spent),
        "held_up": [statistics.median(held), min(held), max(held)],
    }


def told(found: dict[str, Any]) -> str:
    median, low, high = found["held_up"]
    return (
        f"{found['arch']}, {found['images']} images an epoch: an epoch that ends in a checkpoint "
        f"takes {median:.4f} times ({low:.4f} to {high:.4f}) as long; with nothing done beside the "
        f"writing it would be {1 + found['save_s'] / found['epoch_s']:.4f} times"
    )


if __name__ == "__main__":
    main()
