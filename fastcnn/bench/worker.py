"""A process with one setting of the allocator, which times single steps as it is told.

    python -m fastcnn.bench.worker plain|tuned '<task as JSON>'

Two of these take turns on a CPU, since what glibc's mallopt sets cannot be unset. "tuned" is how
the command `fastcnn` sets up its own process, "plain" how Python starts. The process says on one
line which variants it has, which are wrong, and the facts; then it takes the name of a variant a
line and answers with the seconds of one step.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from fastcnn.errors import FastcnnError
from fastcnn.train import host

ROOT = Path(__file__).resolve().parents[2]  # the child's package is this one
SETTINGS = ("plain", "tuned")
ENDS_S = 60  # for a process that has closed its output


class Worker:
    """One such process, from outside: `variants` that it can time, those that are `wrong`,
    `facts` of each."""

    def __init__(self, setting: str, task: Any):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        if setting == "plain" and environment.get("GOMP_SPINCOUNT") == host.SPIN_TURNS:
            del environment["GOMP_SPINCOUNT"]  # the command's own
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastcnn.bench.worker", setting, task.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            found = json.loads(self._answer())
        except BaseException:
            self.close()
            raise
        self.variants: list[str] = found["variants"]
        self.wrong: dict[str, str] = found["wrong"]
        self.facts: dict[str, dict[str, Any]] = found["facts"]

    def time(self, variant: str) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{variant}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        code = self._process.wait(ENDS_S)
        raise FastcnnError(f"a process of the benchmark ended with code {code}; see its output")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


def main(setting: str, task_text: str) -> None:
    if setting == "tuned":
        host.share_the_cores()  # before torch is imported
    import torch

    from fastcnn import ops
    from fastcnn.bench.rivals.variants import Task
    from fastcnn.bench.steps import Steps

    task = Task.from_json(task_text)
    if setting == "tuned":
        host.tune_process(task.threads)
    elif task.threads:
        torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    # torch.compile imports it, and without a GPU it warns of the CUDA toolkit that it has found
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # the answers alone go where they are read
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ops.load()
    steps = Steps(task)
    first = {"variants": steps.variants, "wrong": steps.wrong, "facts": steps.facts}
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        print(steps.time(line.strip()), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
