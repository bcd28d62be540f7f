"""`fastcnn build`: compile the native library."""

from typing import Any

from fastcnn.commands.parser import (
    Parser,
    add_debug,
    add_options,
    new_parser,
    own_option,
    read_values,
)

BUILD_OWN = (
    own_option(
        "archs",
        str | None,
        None,
        "CUDA architectures such as 8.0;9.0+PTX, or none; default: FASTCNN_CUDA_ARCHS, else those "
        "of the GPUs present",
    ),
)


def parser() -> Parser:
    found = new_parser(
        "build",
        "Compile the native library, which the first training would do else. One that is there "
        "and holds all that is asked for is not compiled again.",
    )
    found.add_argument(
        "--cuda",
        action="store_true",
        help="with CUDA kernels, on a machine without a GPU too: for 8.0;9.0+PTX if no "
        "architectures are named",
    )
    found.add_argument("--cpu", action="store_true", help="for the CPU alone")
    add_options(found, BUILD_OWN)
    found.add_argument("--force", action="store_true", help="compile in any case")
    found.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.ops.native import build

    quiet = given.get("quiet", False)
    named = read_values(given, BUILD_OWN).get("archs")
    archs = build.archs_of_flags(named, given.get("cuda", False), given.get("cpu", False))
    built = build.ensure(archs, given.get("force", False), quiet)
    print(built.summary)
    path, reason = build.ensure_module(built, quiet)
    print(f"Python module: {path}" if path else f"note: {reason}")
