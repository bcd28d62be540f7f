"""`fastcnn analyze` on a small run: its files, its page, its figures and its errors."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_folder
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score
from small_runs import start

from fastcnn.archs.elementary import Elementary
from fastcnn.cli import main
from fastcnn.commands.analyze import result_text
from fastcnn.errors import CheckpointError, UsageError
from fastcnn.insight.analysis import analysis_figures, analysis_files
from fastcnn.insight.analysis.analyze import analyze, folder_name
from fastcnn.insight.analysis.calibration import calibrate
from fastcnn.insight.analysis.classes import class_figures, confusion_counts
from fastcnn.insight.analysis.findings import choose_images, find
from fastcnn.insight.analysis.gradcam import enlarged, gradcam
from fastcnn.insight.analysis.predict_split import observe, open_tested
from fastcnn.insight.drawing import image_figures
from fastcnn.insight.drawing.figures import shortened
from fastcnn.insight.drawing.image_figures import Cell, draw_cells, overlay
from fastcnn.insight.run_page.saved_sections import saved_sections

ONE = {"threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return start(tmp_path_factory.mktemp("analyze"), epochs=1, test_subset=60).folder.path


@pytest.fixture(scope="module")
def command(run):
    """The run after the command; what it printed."""
    words = ["analyze", str(run), "--samples", "6", "--layer", "conv2", "--maps", "conv1", "ReLU-9"]
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *text, **_: lines.append(" ".join(map(str, text))))
        assert main([*words, "--threads", "1"]) == 0
    return run, "\n".join(lines)


@pytest.fixture(scope="module")
def seen(run):
    trained, device = open_tested(str(run), None, ONE)
    return observe(trained, device, overrides=ONE)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.full
def test_tables_hold_every_image_and_class(command, seen):
    folder = command[0] / "analysis"
    rows = table(folder / "predictions.csv")
    assert [row["image"] for row in rows] == [str(i) for i in range(60)]
    labels, predicted = ([int(row[name]) for row in rows] for name in ("true", "predicted"))
    assert (labels, predicted) == (seen.labels.tolist(), seen.predicted.tolist())
    for row, odds in zip(rows, seen.probabilities, strict=True):
        assert float(row["probability"]) == pytest.approx(odds.max(), rel=1e-5)
        assert float(row["true_probability"]) == pytest.approx(odds[int(row["true"])], rel=1e-5)
    wanted = confusion_matrix(labels, predicted, labels=range(10))
    for name, values in (
        ("confusion_matrix.csv", wanted),
        ("confusion_rates.csv", wanted / wanted.sum(1, keepdims=True)),
    ):
        cells = [[float(row[str(c)]) for c in range(10)] for row in table(folder / name)]
        np.testing.assert_allclose(cells, values, rtol=1e-5)
    classes = table(folder / "classes.csv")
    assert [float(row["f1"]) for row in classes] == pytest.approx(
        f1_score(labels, predicted, labels=range(10), average=None, zero_division=0), rel=1e-5
    )
    assert [int(row["images"]) for row in classes] == wanted.sum(1).tolist()
    confusions = table(folder / "confusions.csv")
    assert sum(int(row["images"]) for row in confusions) == wanted.sum() - wanted.trace()
    first = confusions[0]
    assert int(first["images"]) == wanted[int(first["true"]), int(first["predicted"])]
    bins = table(folder / "calibration.csv")
    assert (len(bins), sum(int(row["images"]) for row in bins)) == (15, 60)


def test_the_terminal_says_what_matters_and_where_the_files_are(command, seen):
    folder, text = command
    top1 = np.mean(seen.predicted == seen.labels)
    assert f"accuracy {top1:.2%}, macro F1 " in text
    assert f"ECE {calibrate(seen.logits, seen.labels).ece:.4f}" in text
    assert "Grad-CAM of MaxPool2d-7" in text
    assert f"in {folder / 'analysis'}" in text
    assert re.search(r"\d predicted as \d: \d+ images", text)


def test_names_of_classes_are_told_in_one_line_that_no_terminal_obeys():
    pair = {"true": "a\nb", "predicted": "\x1b[31mred", "images": 3, "share": 0.5}
    numbers = dict.fromkeys(("images", "top1", "macro_f1", "ece", "confidence"), 1)
    words = dict.fromkeys(("arch", "checkpoint", "split", "grad_cam", "folder", "page"), "x")
    found = {**numbers, **words, "data": "d\x07", "confusions": [pair], "files": []}
    text = result_text(found)
    assert r"  a\nb predicted as \x1b[31mred: 3 images, 50.0% of a\nb" in text.splitlines()
    assert {*text} & {"\x1b", "\x07"} == set()


def test_the_summary_and_the_sections_agree(command, seen):
    folder = command[0] / "analysis"
    summary = json.loads((folder / "summary.json").read_text())
    labels, predicted = seen.labels, seen.predicted
    assert summary["top1"] == pytest.approx(np.mean(labels == predicted))
    assert summary["macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro", labels=range(10), zero_division=0)
    )
    sections = saved_sections(folder, "analysis")
    assert [section.title for section in sections] == [
        *("Classes", "Confusions", "Calibration", "Predictions", "Grad-CAM"),
        "Feature maps and filters",
    ]
    assert len({section.anchor for section in sections}) == len(sections)
    drawn = [figure.path.name for section in sections for figure in section.figures]
    assert sorted(drawn) == sorted(path.name for path in folder.glob("*.png"))
    assert {"gradcam_wrong.png", "feature_maps_conv2d_1.png", "feature_maps_relu_9.png"} < {*drawn}
    assert all(figure.alt and figure.caption for s in sections for figure in s.figures)
    # as the lead of the page writes percentages
    assert re.search(r"\d%", sections[0].sentences[0])
    assert " %" not in (folder / "analysis.json").read_text()
    assert sections[0].facts[0][1].startswith("fastcnn analyze ")
    assert f"Expected calibration error {summary['ece']:.4f}" in sections[2].sentences[1]
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100


def test_another_analysis_takes_the_place_of_the_first(command, monkeypatch):
    run = shutil.copytree(command[0], command[0].parent / "again")
    quick(monkeypatch)
    for mine in ("mine.png", "predictions_mine.png"):
        (run / "analysis" / mine).write_text("the user's")
    found = analyze(str(run), maps=["conv2"], samples=2, overrides=ONE)
    assert found["grad_cam"] == "MaxPool2d-10"
    names = {path.name for path in (run / "analysis").glob("feature_maps*")}
    assert names == {"feature_maps_conv2d_5.png"}
    assert sorted(path.name for path in (run / "analysis").iterdir()) == sorted(
        [*found["files"], "analysis.json", "mine.png", "predictions_mine.png"]
    )


def quick(monkeypatch):
    """Figures as empty files: drawing takes the longest."""

    def touch(figure, path):
        path.touch()
        return path

    for module in (analysis_figures, image_figures):
        monkeypatch.setattr(module, "save", touch)


@pytest.mark.full
def test_other_data_and_splits_have_a_folder_of_their_own(run, tmp_path, monkeypatch, capsys):
    quick(monkeypatch)
    copy = shutil.copytree(run, tmp_path / "run")
    data = write_folder(tmp_path / "other images", classes=list("0123456789"), count=2, side=8)
    words = ["--data", str(data), "--store", "files", "--loader", "torch", "--workers", "0"]
    assert main(["analyze", str(copy), *words, "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    folder = copy / "analysis-other_images"
    assert (found["folder"], found["images"]) == (str(folder), 20)
    rows = table(folder / "predictions.csv")
    assert [row["image"] for row in rows] == [
        f"test/{c}/{i}.png" for c in range(10) for i in (0, 1)
    ]
    sections = saved_sections(folder, "analysis")
    assert sections[0].title == "Classes (other_images)"
    assert sections[0].anchor == "analysis-other_images-classes"
    found = analyze(str(copy), split_name="train", overrides=ONE)
    assert (found["folder"], found["images"]) == (str(copy / "analysis-train"), 64)


def test_names_of_folders_hold_nothing_odd():
    assert folder_name("", "test") == "analysis"
    assert folder_name("a/b c.tar", "val") == "analysis-a_b_c.tar-val"


def refused(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        analyze(*arguments, overrides=ONE, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_are_one_line_and_come_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fastcnn.insight.analysis.analyze.observe", None)
    text = refused(UsageError, str(run / "last.pt"))
    assert f"give the run folder {run} --weights last" in text
    assert "did you mean 'conv3'" in refused(UsageError, str(run), layer="conv33")
    assert "has no pixels" in refused(UsageError, str(run), layer="fc1")
    assert "--maps fc1: " in refused(UsageError, str(run), maps=["fc1"])
    assert "--maps: the network has no layer" in refused(UsageError, str(run), maps=["x"])
    assert "not a run folder" in refused(CheckpointError, str(tmp_path / "no"))
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").unlink()
    assert "is not finished; go on with fastcnn train --resume" in refused(
        CheckpointError, str(copy)
    )


def test_a_place_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))

    original = Path.mkdir

    def mkdir(path, *arguments, **options):
        if path == copy / "analysis":
            raise OSError(30, "Read-only file system")
        original(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    text = refused(CheckpointError, str(copy), samples=1)
    assert text == f"cannot write into {copy / 'analysis'}: Read-only file system"


def test_images_are_chosen_by_confidence_and_by_the_seed():
    labels = np.array([0, 0, 1, 1, 0, 1, 0])
    predicted = np.array([0, 1, 1, 0, 0, 0, 0])
    confidence = np.array([0.9, 0.6, 0.7, 0.99, 0.5, 0.8, 0.7])
    found = choose_images(labels, predicted, confidence, 3, 0)
    assert found["wrong"].tolist() == [3, 5, 1]
    assert found["right"].tolist() == [4, 2, 6]
    assert len({*found["random"].tolist()}) == 3
    assert (labels == predicted)[found["random_right"]].all()
    again, other = (choose_images(labels, predicted, confidence, 7, seed) for seed in (0, 1))
    assert again["random"][:3].tolist() == found["random"].tolist() != other["random"][:3].tolist()
    assert len(again["wrong"]) == 3
    assert len(again["random_right"]) == 4


def test_findings_are_of_the_chosen_images(seen):
    found = find(seen, "ReLU-9", [("Conv2d-1", "BatchNorm2d-2")], 4, 3)
    right = seen.labels == seen.predicted
    assert {name: len(picked.places) for name, picked in found.grids.items()} == {
        "wrong": 4,
        "right": min(4, right.sum()),
        "random": 4,
    }
    network = Elementary(seen.trained.model)
    pictures = [*found.grids.values(), *(cam[0] for cam in found.cams.values()), found.shown]
    for picked in pictures:
        np.testing.assert_array_equal(picked.pixels, seen.images.pixels_of(picked.places))
    for name, (picked, for_predicted, for_true) in found.cams.items():
        assert (right[picked.places] == (name == "right")).all()
        x = seen.trained.normalization.apply(torch.from_numpy(picked.pixels)).permute(0, 3, 1, 2)
        for maps, classes in ((for_predicted, seen.predicted), (for_true, seen.labels)):
            wanted = gradcam(network, x, "ReLU-9", torch.from_numpy(classes[picked.places]))
            assert maps.shape == (len(picked.places), 32, 32)
            np.testing.assert_allclose(maps, enlarged(wanted, (32, 32)).numpy(), atol=1e-5)
    _, for_predicted, for_true = found.cams["wrong"]
    assert not np.allclose(for_predicted, for_true, atol=1e-5)
    x = seen.trained.normalization.apply(torch.from_numpy(found.shown.pixels)).permute(0, 3, 1, 2)
    wanted = seen.trained.model.conv1.conv(x)[0].detach().numpy()
    assert [name for name, _ in found.maps[0]] == ["Conv2d-1", "BatchNorm2d-2"]
    np.testing.assert_allclose(found.maps[0][0][1], wanted, rtol=1e-4, atol=1e-5)


def test_a_network_without_mistakes_has_no_page_of_them(run, tmp_path, monkeypatch):
    quick(monkeypatch)
    copy = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(
        "fastcnn.insight.analysis.predict_split._batches",
        lambda trained, own: (
            (torch.nn.functional.one_hot(labels, 10).float(), labels) for _, labels in own.loader
        ),
    )
    found = analyze(str(copy), samples=3, overrides=ONE)
    assert (found["top1"], found["confusions"]) == (1, [])
    assert not {"predictions_wrong.png", "gradcam_wrong.png"} & {*found["files"]}
    sections = saved_sections(copy / "analysis", "analysis")
    assert sections[1].sentences == ("No image was confused.",)
    assert sections[3].sentences == ("No prediction is wrong.",)


def caught(monkeypatch, module):
    """The figure that a function draws, in place of its file."""
    figures = []
    monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure) or path)
    return figures


def boxes(figure):
    """Where each text that is drawn stands, in dots, and the figure's own size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    drawn, original = [], Text.draw

    def draw(self, *arguments, **options):
        drawn.append(self)
        return original(self, *arguments, **options)

    figure.set_dpi(100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        FigureCanvasAgg(figure).draw()
    shown = [text for text in dict.fromkeys(drawn) if text.get_visible() and text.get_text()]
    return {text: text.get_window_extent() for text in shown}, figure.bbox


def assert_inside(figure):
    found, whole = boxes(figure)
    assert found
    for text, box in found.items():
        inside = box.x0 > -1 and box.y0 > -1 and box.x1 < whole.x1 + 1 and box.y1 < whole.y1 + 1
        assert inside, (text.get_text(), box)
    return found


LONG = "European fire salamander of the northern woods"


@pytest.mark.full
@pytest.mark.parametrize("classes", [2, 20, 200])
def test_a_confusion_matrix_is_legible(classes, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, (classes, classes)) + 900 * np.eye(classes, dtype=int)
    counts[1] = 0
    names = [f"{i} {LONG}" for i in range(classes)]
    figures = caught(monkeypatch, analysis_figures)
    analysis_figures.draw_counts(tmp_path / "x.png", counts, names)
    analysis_figures.draw_rates(tmp_path / "x.png", counts, names)
    for figure, wanted in zip(
        figures, (counts, counts / counts.sum(1).clip(1)[:, None]), strict=True
    ):
        axis = figure.axes[0]
        values = axis.images[0].get_array()
        np.testing.assert_allclose(values / (100 if figure is figures[1] else 1), wanted)
        assert (axis.get_xlabel()[:9], axis.get_ylabel()[:4]) == ("predicted", "true")
        assert_inside(figure)
        if classes > 20:
            assert not axis.texts
    if classes == 2:
        assert [text.get_text() for text in figures[0].axes[0].texts] == [
            *(f"{n:,}" if n else "" for n in counts.flat),
        ]
        assert [tick.get_text() for tick in figures[0].axes[0].get_yticklabels()] == [
            "0 European fire salaman…",
            "1 European fire salaman…",
        ]


@pytest.mark.parametrize(("classes", "bars"), [(3, [3]), (50, [50]), (200, [10, 10])])
def test_bars_of_f1_are_the_classes_from_best_to_worst(classes, bars, monkeypatch, tmp_path):
    rng = np.random.default_rng(1)
    labels = np.arange(20 * classes) % classes
    right = rng.random(len(labels)) < rng.random(classes)[labels]
    predicted = np.where(right, labels, rng.integers(0, classes, len(labels)))
    found = class_figures(confusion_counts(labels, predicted, classes))
    figures = caught(monkeypatch, analysis_figures)
    analysis_figures.draw_f1(tmp_path / "x.png", found, [f"{i} {LONG}" for i in range(classes)])
    assert [len(axis.patches) for axis in figures[0].axes] == bars
    heights = [patch.get_width() for axis in figures[0].axes for patch in axis.patches]
    order = np.sort(found.f1)[::-1]
    wanted = order if classes <= 50 else np.concatenate([order[:10], order[-10:]])
    assert heights == pytest.approx(wanted.tolist())
    first = figures[0].axes[0].get_yticklabels()[0].get_text()
    assert first.startswith(f"{found.f1.argmax()} European")
    assert_inside(figures[0])


def test_the_reliability_diagram_shows_its_bins(seen, monkeypatch, tmp_path):
    found = calibrate(seen.logits, seen.labels)
    figures = caught(monkeypatch, analysis_figures)
    analysis_figures.draw_reliability(tmp_path / "x.png", found)
    above, below = figures[0].axes
    filled = found.counts > 0
    accuracies = [patch.get_height() for patch in above.patches[: filled.sum()]]
    assert accuracies == pytest.approx(found.accuracies[filled].tolist())
    gaps = [patch.get_height() for patch in above.patches[filled.sum() :]]
    wanted = np.abs(found.accuracies - found.confidences)[filled]
    assert gaps == pytest.approx(wanted.tolist())
    shares = [patch.get_height() for patch in below.patches]
    assert shares == pytest.approx((100 * found.counts / 60).tolist())
    assert_inside(figures[0])


def test_images_of_a_grid_stand_in_order_pixel_by_pixel(tmp_path):
    colors = [(10 * i + 5, 200 - 10 * i, 90) for i in range(7)]
    pixels = [np.full((4, 4, 3), color, np.uint8) for color in colors]
    cells = [Cell([(image, "below")], [("a line", "black")]) for image in pixels]
    path = draw_cells(tmp_path / "grid.png", cells, 3, "title")
    with Image.open(path) as image:
        shown = np.array(image.convert("RGB"))
    places = [np.argwhere((shown == color).all(2)) for color in colors]
    assert len({len(place) for place in places}) == 1
    # whole squares, large ones
    side = round(len(places[0]) ** 0.5)
    assert side**2 == len(places[0])
    assert side % 4 == 0
    assert side > 250
    corners = [tuple(place.min(0)) for place in places]
    assert corners == sorted(corners)
    assert len({row for row, _ in corners}) == 3
    assert corners[0][1] == corners[3][1] == corners[6][1]


@pytest.mark.parametrize(("columns", "panels"), [(4, 1), (3, 2), (2, 3)])
def test_labels_beside_images_are_not_cut_and_do_not_meet(columns, panels, monkeypatch, tmp_path):
    figures = caught(monkeypatch, image_figures)
    name = shortened(LONG, analysis_files.SHOWN)
    lines = [(f"predicted {name}", "black"), ("100.0%, true class 100.0%", "black")]
    image = np.zeros((64, 64, 3), np.uint8)
    under = f"for {shortened(LONG, analysis_files.SHOWN_BELOW)}" if panels > 1 else ""
    cell = Cell([(image, under)] * panels, lines)
    draw_cells(tmp_path / "x.png", [cell] * (2 * columns), columns, f"{LONG} " * 3)
    found = list(assert_inside(figures[0]).values())
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            assert not (
                one.x0 < other.x1 - 1
                and other.x0 < one.x1 - 1
                and one.y0 < other.y1 - 1
                and other.y0 < one.y1 - 1
            )


def test_an_overlay_is_bright_where_the_map_is():
    image = np.full((4, 4, 3), 120, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2], heat[3, 3] = 0.02, 0.01
    found = overlay(image, heat).astype(int).sum(2)
    assert found.argmax() == 1 * 4 + 2
    assert found[3, 3] > found[0, 0] == found[2, 2]
    assert np.array_equal(overlay(image, heat), overlay(image, 50 * heat))
    assert len(np.unique(overlay(image, 0 * heat).reshape(-1, 3), axis=0)) == 1


def test_feature_maps_are_drawn_before_and_after(monkeypatch, tmp_path):
    figures = caught(monkeypatch, image_figures)
    maps = np.arange(70 * 4, dtype=np.float32).reshape(70, 2, 2)
    image = np.zeros((8, 8, 3), np.uint8)
    image_figures.draw_maps(
        tmp_path / "x.png", [("before", maps), ("after", -maps)], image, "title"
    )
    axis = figures[0].axes[0]
    assert len(axis.images) == 1 + 2 * image_figures.MAPS_SHOWN
    np.testing.assert_allclose(axis.images[1].get_array(), [[0, 1 / 3], [2 / 3, 1]], atol=1e-6)
    np.testing.assert_allclose(axis.images[65].get_array(), [[1, 2 / 3], [1 / 3, 0]], atol=1e-6)
    assert {text.get_text() for text in axis.texts} >= {"before", "after", "image", "title"}
    assert_inside(figures[0])
