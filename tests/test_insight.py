"""Figures and page of a run, from files alone."""

import json
import warnings

import pytest

from fastcnn.insight import figures, page

METRICS = """epoch,train_loss,train_top1,val_loss,val_top1,val_top5,lr,images_per_s,seconds
1,2.0,0.25,1.8,0.3,0.8,0.1,900,5
2,1.5,0.45,1.4,0.5,0.9,0.05,910,5
"""
CONFUSION = "true \\ predicted,a<b,c\na<b,3,1\nc,0,6\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "confusion_matrix.csv").write_text(CONFUSION)
    return tmp_path


def test_csv_files_are_read_back(folder):
    assert figures.read_metrics(folder)["val_top1"] == [0.3, 0.5]
    assert figures.read_confusion(folder) == (["a<b", "c"], [[3, 1], [0, 6]])


def drawn(monkeypatch):
    """Catch the figure instead of writing it."""
    caught = []
    monkeypatch.setattr(figures, "save", lambda figure, path: caught.append(figure) or path)
    return caught


def test_curves_show_the_columns_of_metrics(folder, monkeypatch):
    caught = drawn(monkeypatch)
    figures.draw_curves(folder)
    loss, accuracy, rate = caught[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in loss.lines + accuracy.lines}
    assert lines == {
        "train": [2.0, 1.5],
        "val": [1.8, 1.4],
        "train top-1": [25.0, 45.0],
        "val top-1": [30.0, 50.0],
        "val top-5": [80.0, 90.0],
    }
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.05]


def test_confusion_matrix_shows_rates_by_true_class_and_counts(folder, monkeypatch):
    caught = drawn(monkeypatch)
    figures.draw_confusion(folder)
    axis = caught[0].axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert sorted(text.get_text() for text in axis.texts) == ["1", "3", "6"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a<b", "c"]


def test_class_names_are_no_formulas(folder):
    (folder / "confusion_matrix.csv").write_text("x,$\\frac$,犬\n$\\frac$,3,1\n犬,0,6\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.draw_confusion(folder).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("classes", [2, 20])
def test_long_class_names_leave_room_for_the_cells(tmp_path, classes):
    names = [f"{i:02}{'W' * 200}" for i in range(classes)]
    rows = "".join(f"{name}{',1' * classes}\n" for name in names)
    (tmp_path / "confusion_matrix.csv").write_text(f"x,{','.join(names)}\n{rows}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw_confusion(tmp_path)


def test_a_run_without_an_epoch_has_no_curves(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS.splitlines()[0] + "\n")
    assert figures.draw_curves(tmp_path) is None


def test_page_is_self_contained_and_escapes_what_it_shows(folder):
    summary = {
        "arch": "cnn-a",
        "data": "<script>alert(1)</script>",
        "test_top1": 0.5,
        "test_top5": 0.9,
        "epochs": 2,
        "train_seconds": 10.0,
        "images_per_s": 905.0,
        "device": "cpu",
        "versions": {"torch": "2.11.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"command": ["fastcnn", "train"]}))
    (folder / "config.yaml").write_text("lr: 0.1\nmilestones: [3, 5]\n")
    figures.draw_curves(folder)
    text = page.write_page(folder).read_text()
    assert "<script>" not in text
    assert "Test top-1 50.00%, top-5 90.00% after 2 epochs and 10 s (905 images/s) on cpu." in text
    assert "versions.torch" in text
    assert "fastcnn train" in text
    assert text.count("<img") == text.count("alt=") == 1
    assert 'src="http' not in text
