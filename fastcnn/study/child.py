"""`python -m fastcnn.study.child`: train the run that standard input names (see children.py)."""

import logging
import sys
import threading

from fastcnn.errors import FastcnnError
from fastcnn.train.host import share_the_cores


def main() -> int:
    """Return the exit code of `fastcnn train`."""
    share_the_cores()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from fastcnn.study.children import end_with_parent, task_of
    from fastcnn.study.runner import train_one

    planned, command = task_of(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        train_one(planned, command, quiet=False)
    except FastcnnError as error:
        print(f"fastcnn: {error}", file=sys.stderr)  # noqa: T201 - the log's last line
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
