"""Fill the results of README and docs/results.md from benchmarks/results/, which is never edited.

    python benchmarks/results_table.py            # write the tables between the pages' markers
    python benchmarks/results_table.py --check    # exit code 1 if a page holds other ones

Files are those of `fastcnn bench --json`, of gpu_check.py and of `bench_data.py --json`, and two
older forms: accuracies ("accuracy") and steps timed by what `fastcnn bench` grew from
("times_as_fast_as_eager"). Of two rows of the same thing on the same machine the later file's is
taken. Layers are left out. docs/results.md has every row, README those that HEADLINES names.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from report import REPOSITORY

from fastcnn.bench.table import told_ratios, with_spread
from fastcnn.bench.throughput import ONE, PAIRS

RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
RESULTS_PAGE = REPOSITORY / "docs" / "results.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
Cells = tuple[str, ...]
# bench_data.py's loaders: ours, and torchvision's with their heads
OURS = ("resident", "dali store", "dali files", "torch 2")
RIVALS = {
    "memory 0": "decoded, 0 workers",
    "folder 0": "ImageFolder, 0 workers",
    "folder 2": "ImageFolder, 2 workers",
}
# heading, heads; the first KEYS columns and the machine name a row
TABLES: dict[str, tuple[str, Cells, int]] = {
    "gpu": (
        "Training steps on a GPU: times as fast as each rival of the same run.",
        (
            *("network, batch", "precision", "backend", "images/s", "ms", "peak MiB", "launches"),
            *("of the roofline", "times as fast as"),
        ),
        3,
    ),
    "cpu": (
        "Training steps on a CPU: times as fast as the rival, with the allocator as Python sets it "
        "up for both, as the command does for both, and plain against command.",
        ("network, batch", "backend", "rival", *PAIRS),
        3,
    ),
    "gpu-inference": (
        "Inference on a GPU, batch norms of ours folded: times as fast as each rival of the same "
        "run.",
        (
            *("network, batch", "precision", "backend", "images/s", "ms", "peak MiB", "launches"),
            "times as fast as",
        ),
        3,
    ),
    "cpu-inference": (
        "Inference on a CPU, batch norms of ours folded: columns as for training steps.",
        ("network, batch", "backend", "rival", *PAIRS),
        3,
    ),
    "loaders": (
        "Loaders: images delivered over images that the step consumes.",
        ("network, batch", "loader", "times the step's"),
        2,
    ),
    "rivals": (
        "Loaders against torchvision's DataLoader: times as fast as it is with so many workers, on "
        "decoded images in memory and on files by ImageFolder.",
        ("images, batch", "loader", *RIVALS.values()),
        2,
    ),
    "time": (
        "Time to accuracy: augmentation and evaluation in the clock, compilation out of it.",
        (
            *("network, recipe, data", "target", "met", "epochs to it", "s to it"),
            *("s of all epochs", "final top-1"),
        ),
        2,
    ),
    "accuracy": ("Accuracy on test images.", ("command", "top-1", "top-5"), 1),
}


class Headline(NamedTuple):
    """A row of README: what it says, and the row (by its first cells) and column it is from."""

    what: str
    table: str
    key: Cells
    column: str


HEADLINES = (
    Headline(
        "training step of vgg16, against eager PyTorch",
        "cpu",
        ("vgg16, 64", "fused", "eager"),
        "both tuned",
    ),
    Headline(
        "training step of vgg16, against torch.compile",
        "cpu",
        ("vgg16, 64", "fused", "compile"),
        "both tuned",
    ),
    Headline(
        "training step of resnet18, against eager PyTorch",
        "cpu",
        ("resnet18, 64", "fused", "eager"),
        "both tuned",
    ),
    Headline(
        "training step of tiny-d (2x2 filters), against eager PyTorch",
        "cpu",
        ("tiny-d, 64", "fused", "eager"),
        "both tuned",
    ),
    Headline(
        "inference with vgg16, against OpenVINO",
        "cpu-inference",
        ("vgg16, 64", "fused", "openvino"),
        "both tuned",
    ),
    Headline(
        "batches of 64x64 images kept in memory, against ImageFolder with 2 workers",
        "rivals",
        ("tiny 64x64, 128", "resident"),
        RIVALS["folder 2"],
    ),
    Headline(
        "top-1 of vgg16 on digits",
        "accuracy",
        ("`fastcnn train --arch vgg16 --data digits --amp`",),
        "top-1",
    ),
    Headline(
        "top-1 of cnn-a on 1,000 images of CIFAR-10, trained on 5,000",
        "accuracy",
        (
            "`fastcnn train --arch cnn-a --data cifar10-images --train-subset 5000 "
            "--test-subset 1000`",
        ),
        "top-1",
    ),
)
Rows = dict[str, dict[Cells, Cells]]


def rows_of(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    """Yield the rows of a file, each with its table's name; n and the machine are the last two."""
    if "stages" in content:
        for stage in content["stages"].values():
            yield from rows_of(stage.get("content") or {})
    elif "accuracy" in content:
        yield from accuracy_rows(content)
    elif "mode" in content:
        make = {
            "throughput": step_rows,
            "inference": inference_rows,
            "data-only": loader_rows,
            "time-to-accuracy": time_rows,
        }
        if content["mode"] in make:
            yield from make[content["mode"]](content)
    elif "results" in content:
        yield from rival_rows(content)
    elif any("times_as_fast_as_eager" in row for row in content.get("rows", [])):
        yield from older_step_rows(content)


def step_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    for row in content["rows"]:
        if "why" in row:
            continue
        what, machine = f"{row['network']}, {row['batch']}", machine_of(content)
        what += f", loader {row['loader']}" if row["loader"] != "resident" else ""
        found = told_ratios(row)
        if content["machine"]["gpu"] is None:
            for rival, pairs in found.items():
                ratios = [with_spread(pairs[p]) if p in pairs else "" for p in PAIRS]
                yield "cpu", (what, row["backend"], rival, *ratios, str(row["n"]), machine)
            continue
        share = row.get("roofline_share", {}).get("K5")
        yield (
            "gpu",
            (
                *(what, row["precision"], row["backend"]),
                with_spread(row["images_per_s"], ",.0f"),
                f"{row['ms_per_step']['median']:.3f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['launches']:,.0f}",
                f"{share:.0%}" if share else "",
                ", ".join(f"{r} {v[ONE]['median']:.2f}" for r, v in found.items()),
                *(str(row["n"]), machine),
            ),
        )


def inference_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    """Those of training steps, but for the share of a training step's roofline."""
    for name, cells in step_rows(content):
        yield f"{name}-inference", (*cells[:7], *cells[8:]) if name == "gpu" else cells


def older_step_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    for row in content["rows"]:
        ratios = row["times_as_fast_as_eager"]
        what = row["task"].replace(" batch ", ", ")
        cells = [with_spread(ratios[pair]) for pair in PAIRS]
        yield "cpu", (what, "fused", "eager", *cells, str(row["rounds"]), machine_of(content))


def loader_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    for row in content["rows"]:
        ratio = with_spread(row["times_as_fast_as"]["step"], ".1f")
        what = f"{row['network']}, {row['batch']}"
        yield "loaders", (what, row["loader"], ratio, str(row["n"]), machine_of(content))


def rival_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    """Of bench_data.py: our loaders; rates are left out, for on a CPU only ratios are told."""
    machine = machine_of(content["environment"])
    for name, result in content["results"].items():
        what = f"{name} {result['side']}x{result['side']}, {result['batch']}"
        for loader in OURS:
            if row := result["loaders"].get(loader):
                found = row["times_as_fast_as"]
                ratios = [with_spread(found[r], ".1f") if r in found else "" for r in RIVALS]
                yield "rivals", (what, loader, *ratios, str(result["n"]), machine)


def time_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    for row in content["rows"]:
        what = f"{row['network']}, {row['recipe']} ({row['epochs']} epochs), {row['data']}"
        names = {"epochs_to_target": ".1f", "seconds_to_target": ".2f", "seconds": ".2f"}
        figures = [with_mean(row.get(name), form) for name, form in names.items()]
        cells = (what, f"{row['target']:.0%}", f"{row['met']} of {row['n']}", *figures)
        last = with_mean(row["final_top1"], ".2%")
        yield "time", (*cells, last, str(row["n"]), machine_of(content))


def accuracy_rows(content: dict[str, Any]) -> Iterator[tuple[str, Cells]]:
    """Runs that differ by their seed alone are a row: mean, and each run's."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in content["accuracy"]:
        command = re.sub(r" --(seed|threads) \d+|[<>]", "", run["command"])
        groups.setdefault(command, []).append(run["summary"])
    for command, found in groups.items():
        torch = found[0]["versions"]["torch"]
        machine = f"{content['machine']['cpu']}, torch {torch}, {content['date']}"
        tops = [means([run[name] for run in found]) for name in ("test_top1", "test_top5")]
        yield "accuracy", (f"`{command}`", *tops, str(len(found)), machine)


def means(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.1%}"
    return mean + (f" ({', '.join(f'{v:.1%}' for v in sorted(values))})" if len(values) > 1 else "")


def machine_of(content: dict[str, Any]) -> str:
    """Where, with what and when."""
    machine = content["machine"]
    where = f"{machine['cpu']}, {content['threads']} threads"
    if machine["gpu"]:
        where = f"{machine['gpu']}, driver {machine['driver']}, cuDNN {content['cudnn']}"
    return f"{where}, torch {content['torch']}, {content['date']}, {content['commit']}"


def with_mean(figures: dict[str, float] | None, form: str) -> str:
    return f"{figures['mean']:{form}}, median {with_spread(figures, form)}" if figures else ""


def tables(contents: Iterable[dict[str, Any]]) -> str:
    """The tables of these files, in their order, as Markdown."""
    found: Rows = {name: {} for name in TABLES}
    for content in contents:
        for name, cells in rows_of(content):
            hardware = cells[-1].split(", ")[0]
            found[name][(*cells[: TABLES[name][2]], hardware)] = cells
    parts = []
    for name, (heading, heads, _) in TABLES.items():
        if found[name]:
            lines = [(*heads, "n", "measured on"), ("---",) * (len(heads) + 2)]
            lines += list(found[name].values())
            parts += [heading, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts)


def headlines(contents: Iterable[dict[str, Any]]) -> str:
    """README's table, each row with the command that measured it; the later file's of two.

    Raises ValueError if a row of HEADLINES is in no file.
    """
    found: dict[tuple[str, Cells], tuple[Cells, str]] = {}
    for content in contents:
        for name, cells in rows_of(content):
            command = cells[0] if name == "accuracy" else f"`{content.get('command', '')}`"
            found[name, cells[: TABLES[name][2]]] = cells, command
    lines = [("what", "result", "n", "command", "measured on"), ("---",) * 5]
    for what, name, key, column in HEADLINES:
        if (name, key) not in found:
            raise ValueError(f"benchmarks/results has no row {', '.join(key)} of table {name}")
        cells, command = found[name, key]
        figure = cells[TABLES[name][1].index(column)]
        figure += "" if name == "accuracy" else " times as fast"
        lines.append((what, figure, cells[-2], command, cells[-1]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(name: str, page: str, text: str) -> str:
    """The page with the text between its markers; raises ValueError if it has none."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{name} has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    check = parser.parse_args().check
    contents = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    stale = False
    for page, text in ((README, headlines(contents)), (RESULTS_PAGE, tables(contents))):
        old = page.read_text("utf-8")
        new = filled(page.name, old, text)
        if old == new:
            continue
        stale = True
        if check:
            print(f"{page.name}: its results are stale; run python benchmarks/results_table.py")
        else:
            page.write_text(new, "utf-8")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
