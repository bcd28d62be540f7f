"""The `fastcnn` command: parse, call, print."""

import contextlib
import logging
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from fastcnn.commands import (
    analyze,
    archs,
    bench,
    build,
    compare,
    data,
    doctor,
    evaluate,
    export,
    ood,
    predict,
    reproduce,
    sweep,
    train,
)
from fastcnn.commands.parser import PARSERS, Parser, PlainHelp
from fastcnn.errors import FastcnnError, UsageError
from fastcnn.signals import StopAnywhere, Stopped
from fastcnn.train.host import share_the_cores
from fastcnn.version import __version__

BROKEN_PIPE = 141  # what a shell reports of a command that SIGPIPE ended

# name: its module, which has `parser()` and `run(given, command)`, and a line about it
COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "train": (train, "train a network"),
    "eval": (evaluate, "evaluate a run or a checkpoint"),
    "predict": (predict, "tell the classes of images"),
    "analyze": (analyze, "look inside a run: confusions, Grad-CAM, calibration, feature maps"),
    "ood": (ood, "tell images of other data from those of a run"),
    "compare": (compare, "set runs side by side, in a table and on a page"),
    "export": (export, "write the network of a run as ONNX, torch.export or safetensors"),
    "data": (data, "check, pack or show the images of a data set"),
    "archs": (archs, "list the networks, show their layers"),
    "bench": (bench, "compare training steps, measure loaders and layers"),
    "reproduce": (reproduce, "train a report's experiments, published figures beside ours"),
    "sweep": (sweep, "train every combination of options, compare them in one table"),
    "build": (build, "compile the native library"),
    "doctor": (doctor, "what this machine offers, what is missing"),
}


def build_parser() -> Parser:
    """The parser of all commands, those of the single ones in PARSERS."""
    parser = Parser(
        prog="fastcnn",
        description="Train convolutional image classifiers as fast as the hardware allows.",
        formatter_class=PlainHelp,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastcnn {__version__}")
    commands = parser.add_subcommands(required=True, title="commands")
    for name, (module, text) in COMMANDS.items():
        PARSERS[name] = module.parser()
        commands.add_subcommand(name, PARSERS[name], help=text)
    return parser


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and only what the user gave it, by option name."""
    parser = build_parser()
    parser.command = next((word for word in arguments if word in PARSERS), None)
    namespace = parser.parse_args(arguments, defaults=False)
    name = namespace.subcommand
    return name, dict(vars(namespace.get(name))) if namespace.get(name) else {}


def log_to_stderr(level: int) -> None:
    """Let the package's notes and warnings appear as lines on standard error."""
    logger = logging.getLogger("fastcnn")
    logger.setLevel(level)
    logger.handlers[:] = [logging.StreamHandler()]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 2 usage, 3 data, 4 checkpoint, 5 build,
    6 numbers, 128 + the number of a signal that stopped it."""
    words = sys.argv[1:] if arguments is None else arguments
    share_the_cores()
    try:
        with StopAnywhere() as stop:
            name, given = parse(words)
            rank = rank_of_several()
            if rank is not None and name != "train":
                raise UsageError(f"{name} is for one process; torchrun is for fastcnn train")
            quiet = logging.WARNING if given.get("quiet") else logging.INFO
            # what the others have to say, rank 0 says as well
            log_to_stderr(logging.ERROR if rank else quiet)
            COMMANDS[name][0].run(given, ["fastcnn", *words])
            sys.stdout.flush()
            stop.check()
    except FastcnnError as error:
        return failed(str(error), error.exit_code, words)
    except Stopped as stopped:
        return failed(str(stopped), 128 + stopped.signum, words)
    except KeyboardInterrupt:
        return failed("interrupted", 130, words)
    except BrokenPipeError:
        # whoever read the output has gone; let the interpreter's last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return failed(f"{where}{error.strerror or error}", 1, words)
    except Exception as error:  # a fault of this program: still one line, and how to see more
        reason = " ".join(str(error).split())[:200]
        return failed(f"unexpected {type(error).__name__}: {reason}; --debug shows where", 1, words)
    return 0


def rank_of_several() -> int | None:
    """The number that torchrun gave this process among several; None for one alone."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    several = rank.isdecimal() and world.isdecimal() and int(world) > 1
    return int(rank) if several else None


def failed(message: str, exit_code: int, words: list[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    rank = rank_of_several()
    who = "fastcnn" if rank is None else f"fastcnn (rank {rank})"
    with contextlib.suppress(OSError):
        print(f"{who}: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
