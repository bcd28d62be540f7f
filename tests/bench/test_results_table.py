"""The tables of results: what the files hold, row by row, and that no page is stale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import results_table

from fastcnn.bench.throughput import ONE, PAIRS

FIGURES = {"median": 2.0, "min": 1.0, "max": 3.0}
MACHINE = {"cpu": "a CPU", "gpu": None}
GPU = {"cpu": "a CPU", "gpu": "a GPU", "driver": "1.2"}
ENVIRONMENT = {"torch": "2", "cudnn": 9, "threads": 4, "date": "d", "commit": "c"}
NAMED = {"network": "vgg16", "batch": 8, "loader": "resident", "backend": "fused"}


def content(machine, mode, *rows):
    return {**ENVIRONMENT, "machine": machine, "mode": mode, "rows": list(rows)}


def step(machine, **more):
    pair = [ONE] if machine["gpu"] else PAIRS
    row = NAMED | {"n": 7, "precision": "bf16", "times_as_fast_as": {}}
    row["times_as_fast_as"] = {"eager": dict.fromkeys(pair, FIGURES)}
    row |= {"images_per_s": FIGURES, "ms_per_step": FIGURES, "peak_bytes": 2**21, "launches": 12.0}
    return content(machine, "throughput", row | {"roofline_share": {"K5": 0.61}} | more)


def test_inference_has_tables_of_its_own():
    found = step(GPU)
    del found["rows"][0]["roofline_share"]
    [(name, cells)] = results_table.rows_of(found | {"mode": "inference"})
    assert name == "gpu-inference"
    assert len(cells) == len(results_table.TABLES[name][1]) + 2
    assert cells[7] == "eager 2.00"
    [(name, cells)] = results_table.rows_of(step(MACHINE) | {"mode": "inference"})
    assert name == "cpu-inference"
    assert len(cells) == len(results_table.TABLES[name][1]) + 2


def test_no_page_is_stale():
    command = [sys.executable, str(results_table.REPOSITORY / "benchmarks/results_table.py")]
    found = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_stale_pages_are_told_and_then_filled(tmp_path, monkeypatch, capsys):
    pages = [tmp_path / "README.md", tmp_path / "results.md"]
    text = f"before\n{results_table.BEGIN}\nold\n{results_table.END}\nafter\n"
    for name, page in zip(("README", "RESULTS_PAGE"), pages, strict=True):
        monkeypatch.setattr(results_table, name, page)
        page.write_text(text)
    monkeypatch.setattr(results_table, "RESULTS", tmp_path)
    row = ("a step", "cpu", ("vgg16, 8", "fused", "eager"), "both tuned")
    monkeypatch.setattr(results_table, "HEADLINES", (row,))
    (tmp_path / "a.json").write_text(json.dumps(step(MACHINE) | {"command": "x"}))
    monkeypatch.setattr(sys, "argv", ["results_table.py", "--check"])
    assert results_table.main() == 1
    assert capsys.readouterr().out.count("stale") == 2
    assert [page.read_text() for page in pages] == [text, text]
    monkeypatch.setattr(sys, "argv", ["results_table.py"])
    assert results_table.main() == 0
    for page in pages:
        new = page.read_text()
        assert new.startswith("before\n")
        assert new.endswith("after\n")
        assert "2.00 (1.00 to 3.00)" in new
        assert "old" not in new
    monkeypatch.setattr(sys, "argv", ["results_table.py", "--check"])
    assert results_table.main() == 0


def test_a_page_without_markers_is_an_error():
    with pytest.raises(ValueError, match=r"a\.md has no <!-- results -->"):
        results_table.filled("a.md", "nothing", "text")


def test_headlines_name_the_command_and_take_the_later_file(monkeypatch):
    row = ("a step", "cpu", ("vgg16, 8", "fused", "eager"), "both tuned")
    monkeypatch.setattr(results_table, "HEADLINES", (row,))
    files = [step(MACHINE, n=n) | {"command": f"bench {n}"} for n in (7, 9)]
    text = results_table.headlines(files)
    assert text.splitlines()[2:] == [
        "| a step | 2.00 (1.00 to 3.00) times as fast | 9 | `bench 9` | "
        "a CPU, 4 threads, torch 2, d, c |"
    ]
    with pytest.raises(ValueError, match="no row vgg16, 8, fused, eager of table cpu"):
        results_table.headlines([])


def test_rows_of_a_gpu_name_machine_versions_date_and_n():
    text = results_table.tables([step(GPU)])
    row = text.splitlines()[-1]
    assert row == (
        "| vgg16, 8 | bf16 | fused | 2 (1 to 3) | 2.000 | 2 | 12 | 61% | eager 2.00 | 7 | "
        "a GPU, driver 1.2, cuDNN 9, torch 2, d, c |"
    )
    assert len(text.splitlines()) == 5


def test_rows_of_a_cpu_hold_ratios_alone():
    text = results_table.tables([step(MACHINE)])
    cells = text.splitlines()[-1].strip("| ").split(" | ")
    assert cells == [
        *("vgg16, 8", "fused", "eager", *["2.00 (1.00 to 3.00)"] * 3),
        *("7", "a CPU, 4 threads, torch 2, d, c"),
    ]


def test_later_files_replace_rows_of_the_same_machine():
    later = step(MACHINE, n=9)
    other = step(MACHINE | {"cpu": "another CPU"})
    lines = results_table.tables([step(MACHINE), other, later]).splitlines()[4:]
    assert [line.split(" | ")[-2] for line in lines] == ["9", "7"]


def test_what_failed_and_what_has_no_table_is_left_out():
    failed = step(GPU, why="too little memory")
    assert results_table.tables([failed, content(GPU, "layers", {"layer": "conv1"})]) == ""


def test_stages_of_gpu_check_are_read():
    stages = {"build": {"state": "passed"}, "bench-step": {"content": step(GPU)}}
    assert "vgg16, 8" in results_table.tables([{"stages": stages}])


def test_loaders_and_times():
    row = NAMED | {"n": 7, "times_as_fast_as": {"step": FIGURES}}
    text = results_table.tables([content(MACHINE, "data-only", row)])
    assert "| vgg16, 8 | resident | 2.0 (1.0 to 3.0) | 7 |" in text
    top1 = {"mean": 0.941, "median": 0.94, "min": 0.93, "max": 0.95}
    row = {"network": "vgg16", "recipe": "modern", "epochs": 9, "data": "cifar10", "n": 5}
    row |= {"target": 0.94, "met": 4, "final_top1": top1, "seconds": {"mean": 2.5, **FIGURES}}
    text = results_table.tables([content(GPU, "time-to-accuracy", row)])
    assert "| vgg16, modern (9 epochs), cifar10 | 94% | 4 of 5 |  |  | 2.50, median 2.00" in text
    assert "94.10%, median 94.00% (93.00% to 95.00%) | 5 | a GPU" in text


def loaders(machine, **loaders):
    """A file of bench_data.py."""
    rivals = {"folder 0": FIGURES, "folder 2": FIGURES | {"median": 2.5}}
    row = {"images_per_s": FIGURES | {"median": 4321.0}, "times_as_fast_as": rivals}
    held = {"memory 0": row, "resident": row, "torch 2": row, "folder 0": row, **loaders}
    result = {"batch": 8, "side": 32, "n": 7, "images": "given", "loaders": held}
    return {"command": "x", "environment": ENVIRONMENT | {"machine": machine}, "targets": []} | {
        "results": {"cifar": result}
    }


@pytest.mark.parametrize("machine", [MACHINE, GPU])
def test_loaders_against_torchvision_hold_ratios_of_ours_alone(machine):
    text = results_table.tables([loaders(machine)])
    assert "against torchvision's DataLoader" in text
    heads, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["cifar 32x32, 8", n] for n in ("resident", "torch 2")]
    assert {len(row) for row in rows} == {len(heads)}
    assert dict(zip(heads, rows[0], strict=True)) | {"measured on": ""} == {
        "images, batch": "cifar 32x32, 8",
        "loader": "resident",
        "decoded, 0 workers": "",
        "ImageFolder, 0 workers": "2.0 (1.0 to 3.0)",
        "ImageFolder, 2 workers": "2.5 (1.0 to 3.0)",
        "n": "7",
        "measured on": "",
    }
    assert rows[0][-1] == results_table.machine_of(content(machine, "x"))
    assert "4321" not in text
    assert "4,321" not in text


def test_loaders_against_decoded_images_and_a_later_file():
    faster = {"memory 0": {"median": 20.0, "min": 19.0, "max": 21.0}}
    first = loaders(MACHINE, **{"dali store": {"times_as_fast_as": faster}})
    lines = results_table.tables([loaders(MACHINE), first]).splitlines()[4:]
    assert len(lines) == 3
    assert lines[-1].startswith("| cifar 32x32, 8 | dali store | 20.0 (19.0 to 21.0) |  |  | 7 |")


def test_runs_that_differ_by_their_seed_are_a_row():
    def one(seed, top1):
        summary = {"test_top1": top1, "test_top5": 1.0, "versions": {"torch": "2"}}
        return {"command": f"fastcnn train --data <x> --seed {seed}", "summary": summary}

    found = {"machine": MACHINE, "date": "d", "accuracy": [one(0, 0.5), one(1, 0.7)]}
    text = results_table.tables([found])
    row = text.splitlines()[-1]
    assert row.startswith("| `fastcnn train --data x` | 60.0% (50.0%, 70.0%) | 100.0% (")
    assert row.endswith("| 2 | a CPU, torch 2, d |")
