"""Read damaged and forged files with the product's readers.

    python tests/fuzz.py --seconds 600 [--target tar,zip] [--seed 0] [--folder fuzz-findings]

Small sound files are changed: bits, cuts, splices, repeated blocks, lengths, fields of headers,
opcodes of pickles, trees of values. Each is read in a process apart and must either be read or be
refused by a FastcnnError of one line that names it. Anything else is a finding: another error, 6 s
of the processor, no end, 1 GiB of memory more, a write outside of the input's folder, a program
that is started. The inputs of findings are kept in --folder, and the exit code is 1.

An input follows from its target's name and its number alone, which is --seed and up; `--target zip
--seed 17 --count 1` reads one again.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from fuzzing import archives, records
from fuzzing.guard import Prepare, Reader, Verdict

TARGETS: dict[str, Prepare] = {
    "tar": archives.tar,
    "zip": archives.zipped,
    "cifar": archives.cifar,
    "tiny": archives.tiny_folder,
    "folder": archives.images,
    "config": records.config,
    "run-config": records.run_config,
    "checkpoint": records.load,
    "weights": records.weights,
    "resume": records.resume,
    "sums": records.sums,
    "page": records.page,
    "record": records.record,
}
LIMIT = 30.0  # seconds for an input: it hangs, however busy the machine is
TURN = 5.0  # seconds that a target has before it is the next one's turn
KEPT = 3  # findings of a kind that are kept


def search(
    targets: Mapping[str, Prepare],
    first: int,
    count: int | None,
    seconds: float,
    folder: Path,
    limit: float,
) -> dict[str, Counter[str]]:
    """Read inputs of all targets in turn, at most `count` of each; return what became of them.

    A finding is written to `folder`/<target>-<number>.
    """
    warm_up()
    with tempfile.TemporaryDirectory(prefix="fastcnn-fuzz-") as work:
        reader = Reader(targets, Path(work), limit)
        found: dict[str, Counter[str]] = {name: Counter() for name in targets}
        kinds: Counter[str] = Counter()
        with reader:
            for name, number in _turns(targets, first, count, seconds):
                verdict = reader(name, number)
                found[name][verdict.outcome] += 1
                if verdict.outcome == "fault":
                    kinds[verdict.kind] += 1
                    if kinds[verdict.kind] <= KEPT:
                        keep(folder, name, number, verdict, Path(work, "input"))
    return found


def _turns(
    targets: Mapping[str, Prepare], first: int, count: int | None, seconds: float
) -> Iterator[tuple[str, int]]:
    end = time.monotonic() + seconds
    numbers = {name: iter(_numbers(first, count)) for name in targets}
    while numbers and time.monotonic() < end:
        for name, own in [*numbers.items()]:
            turn = min(end, time.monotonic() + TURN)
            while time.monotonic() < turn:
                if (number := next(own, None)) is None:
                    del numbers[name]
                    break
                yield name, number


def _numbers(first: int, count: int | None) -> Iterator[int] | range:
    return itertools.count(first) if count is None else range(first, first + count)


def keep(folder: Path, name: str, number: int, verdict: Verdict, given: Path) -> None:
    """Write the input and what became of it."""
    place = folder / f"{name}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with_pipes = shutil.ignore_patterns(*(p.name for p in given.rglob("*") if p.is_fifo()))
    shutil.copytree(given, place / "input", symlinks=True, ignore=with_pipes)
    told = {"target": name, "seed": number, "kind": verdict.kind, "detail": verdict.detail}
    (place / "finding.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{name} {number}: {verdict.kind}: {verdict.detail.strip().splitlines()[-1][:200]}")


def warm_up() -> None:
    """Import, before anything is watched, what readers import when they are called; the process
    that reads is forked from this one."""
    torch.set_num_threads(1)
    records.trained()
    records.run_files()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in records.run_files().items():
            path = Path(folder, "run", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        records.write_page(Path(folder, "run"))
    archives.image_members()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--target", default=",".join(TARGETS), help="names, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="inputs of each target; default: no limit")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"))
    given = parser.parse_args(words)
    names = given.target.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]}; there are {', '.join(TARGETS)}")
    targets = {name: TARGETS[name] for name in names}
    found = search(targets, given.seed, given.count, given.seconds, given.folder, LIMIT)
    for name, counts in found.items():
        print(
            f"{name}: {counts.total():,} inputs, {counts['read']:,} read, "
            f"{counts['refused']:,} refused, {counts['fault']:,} findings"
        )
    return 1 if any(counts["fault"] for counts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
