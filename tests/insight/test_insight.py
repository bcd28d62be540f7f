"""Figures of a run, from files alone."""

import warnings

import pytest

from fastcnn.insight.drawing import figures

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


def test_letters_that_the_font_lacks_are_named_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(figures, "_noted", set())
    (folder / "confusion_matrix.csv").write_text("x,犬猫,é\n犬猫,3,1\né,0,6\n", "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            figures.draw_confusion(folder)
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(
        "note: figures: letters that DejaVu Sans lacks are drawn as boxes: 犬 猫;"
    )


def test_other_warnings_of_drawing_are_kept(folder, monkeypatch):
    figure, _ = figures.new_figure(1, 1, (2, 2))
    original = figure.savefig
    warn = lambda *a, **k: (warnings.warn("another", stacklevel=1), original(*a, **k))  # noqa: E731
    monkeypatch.setattr(figure, "savefig", warn)
    with pytest.warns(UserWarning, match="another"):
        figures.save(figure, folder / "a.png")


def test_names_of_classes_stay_in_their_line(folder, monkeypatch):
    (folder / "confusion_matrix.csv").write_text('x,"a\nb",c\n"a\nb",3,1\nc,0,6\n')
    caught = drawn(monkeypatch)
    figures.draw_confusion(folder)
    names = [tick.get_text() for tick in caught[0].axes[0].get_yticklabels()]
    assert names == [r"a\nb", "c"]
    assert figures.shortened("a\nb" * 20) == (r"a\nb" * 20)[:23] + "…"


@pytest.mark.parametrize("classes", [2, 20])
def test_long_class_names_leave_room_for_the_cells(tmp_path, classes):
    names = [f"{i:02}{'W' * 200}" for i in range(classes)]
    rows = "".join(f"{name}{',1' * classes}\n" for name in names)
    (tmp_path / "confusion_matrix.csv").write_text(f"x,{','.join(names)}\n{rows}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw_confusion(tmp_path)


def test_a_figure_takes_the_place_of_a_link_and_spares_what_it_points_to(folder):
    (folder.parent / "mine.png").write_text("mine")
    (folder / "curves.png").symlink_to(folder.parent / "mine.png")
    path = figures.draw_curves(folder)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert (folder.parent / "mine.png").read_text() == "mine"


def test_a_run_without_an_epoch_has_no_curves(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS.splitlines()[0] + "\n")
    assert figures.draw_curves(tmp_path) is None
