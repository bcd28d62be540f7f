"""benchmarks/gpu_reports.py: all reports in pieces, tried on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import stop_at_check

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_reports

from fastcnn.reports.catalogue import REPORTS

pytestmark = pytest.mark.full

SCRIPT = Path(gpu_reports.__file__)
SMALL = ["--device", "cpu", "--scale", "0.01", "--cifar10", "digits", "--no-modern"]


def test_every_report_has_its_turn():
    assert sorted(gpu_reports.ORDER) == sorted(REPORTS)


def test_a_report_is_reproduced_and_copied_without_its_checkpoints(tmp_path, capsys):
    words = ["bohnstedt2019", *SMALL, "--output", str(tmp_path / "out")]
    assert gpu_reports.main([*words, "--copy", str(tmp_path / "copy")]) == 0
    out = capsys.readouterr().out
    assert "| VGG16 |" in out
    assert "target of vgg16, 93.5% top-1: missed" in out
    folder = tmp_path / "copy" / "bohnstedt2019" / "scale-0.01"
    assert (folder / "vgg.md").exists()
    assert (folder / "vgg16" / "seed-0" / "summary.json").exists()
    assert not [*folder.rglob("*.pt")]


@pytest.mark.parametrize(("top1", "word"), [("93.50", "met"), ("93.49", "missed")])
def test_the_target_is_held_against_the_report_s_row(tmp_path, top1, word):
    path = tmp_path / "vgg.csv"
    path.write_text(f"row,top1_mean\nvgg-modern-vgg16,99\nvgg16,{top1}\n")
    assert f"{word} ({top1} %)" in gpu_reports.target_line(path)
    path.write_text("row,top1_mean\n")
    assert gpu_reports.target_line(path).endswith("no run is finished")


def test_a_piece_that_runs_out_of_time_is_saved_and_goes_on(tmp_path, monkeypatch, capsys):
    words = ["bohnstedt2019", *SMALL, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_at_check(patch, 1)
        assert gpu_reports.main(words) == 143
    assert "bohnstedt2019: stopped by SIGTERM" in capsys.readouterr().err
    assert (tmp_path / "bohnstedt2019" / "scale-0.01" / "vgg16" / "seed-0" / "last.pt").exists()
    assert gpu_reports.main(words) == 0


def test_the_time_ends_the_process(tmp_path):
    words = [sys.executable, str(SCRIPT), "bohnstedt2019", *SMALL, "--output", str(tmp_path)]
    ended = subprocess.run([*words, "--seconds", "0.01"], timeout=120, capture_output=True)
    assert ended.returncode in (143, -15)
