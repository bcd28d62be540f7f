"""`python -m fastcnn.bench`: `fastcnn bench` from a bare source tree.

The same options, read by the standard library's parser; with --quiet rich is not needed either.
"""

import argparse
import logging
import sys
from typing import Any

from fastcnn.bench.options import own_options, settings_of, train_options
from fastcnn.errors import FastcnnError
from fastcnn.train.host import share_the_cores


def main(words: list[str]) -> int:
    """Run it; return the exit code of `fastcnn bench`."""
    parser = argparse.ArgumentParser(prog="python -m fastcnn.bench", description=__doc__)
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    for option in [*own_options(), *train_options()]:
        words_of: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.help}
        if option.scalar is bool:
            words_of["action"] = argparse.BooleanOptionalAction
        elif option.scalar is list:
            words_of["nargs"] = "*"
        parser.add_argument(option.flag, **words_of)
    given = vars(parser.parse_args(words))
    logging.basicConfig(
        level=logging.WARNING if given["quiet"] else logging.INFO, format="%(message)s"
    )
    share_the_cores()
    try:
        settings = settings_of(given)
        from fastcnn.bench.run import measure, show

        content = measure(settings, ["python", "-m", "fastcnn.bench", *words])
        show(content, settings, given["quiet"])
    except FastcnnError as error:
        print(f"fastcnn: {error}", file=sys.stderr)  # noqa: T201 - the command's word
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
