"""Packages that are there and cannot be imported: a library that is gone, another's version."""

import sys

import pytest
from commands_apart import SMALL, command
from image_files import write_folder

from fastcnn.packages import PackageError, require

BROKEN = {
    "matplotlib": "raise OSError('libfreetype.so.6: cannot open shared object file')",
    "jinja2": "import collections; collections.Mapping",
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist\\nmore')",
    "PIL": "raise OSError('libjpeg.so.9: cannot open shared object file')",
    "sklearn": "raise ValueError('numpy.dtype size changed')",
    "nvidia/dali": "raise SystemError('initialization failed')",
    "onnx": "raise TypeError('Descriptors cannot be created directly')",
}


class broken:  # noqa: N801 - a function with a folder, that another process can be handed
    """Put packages that cannot be imported before the real ones."""

    def __init__(self, folder, *names):
        self.folder, self.names = folder, names

    def __call__(self):
        sys.path.insert(0, str(self.folder))
        for name in self.names:
            path = self.folder / name
            path.mkdir(parents=True)
            (path / "__init__.py").write_text(BROKEN[name])
            package = name.replace("/", ".")
            for known in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
                del sys.modules[known]
        if "nvidia/dali" in self.names:
            import nvidia

            nvidia.__path__ = [str(self.folder / "nvidia"), *nvidia.__path__]


def ended(tmp_path, names, *words):
    """Exit code and lines of a command beside broken packages."""
    log = tmp_path / "log"
    with command(log, *words, before=broken(tmp_path / "broken", *names)) as process:
        return process.ended(), process.output.splitlines()


@pytest.mark.full
def test_training_goes_on_with_what_is_there(tmp_path):
    names = ["matplotlib", "jinja2", "torchvision", "nvidia/dali", "onnx"]
    where = ["--output", str(tmp_path), "--name", "run"]
    code, lines = ended(tmp_path, names, *SMALL, "--epochs", "1", *where)
    assert code == 0, lines
    gone = "cannot be imported (libfreetype.so.6: cannot open shared object file)"
    for what in ("draw_curves", "draw_confusion"):
        assert f"note: {what}: matplotlib {gone}; see fastcnn doctor" in lines
    reason = "(module 'collections' has no attribute 'Mapping')"
    wanted = f"note: write_page: jinja2 cannot be imported {reason}; see fastcnn doctor"
    assert wanted in lines
    assert lines[-2].startswith("Test top-1 ")
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "run" / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        (
            "torchvision",
            [*SMALL, "--loader", "torch", "--crop-padding", "2"],
            "--loader torch: torchvision cannot be imported (operator torchvision::nms does not "
            "exist); install the torchvision made for this torch, or take --loader resident",
        ),
        (
            "nvidia/dali",
            [*SMALL, "--loader", "dali"],
            "--loader dali: DALI cannot be imported (initialization failed); ",
        ),
        ("sklearn", SMALL, "--data digits: scikit-learn cannot be imported (numpy.dtype size ch"),
        (
            "matplotlib",
            ["analyze", "no/such/run"],
            "matplotlib cannot be imported (libfreetype.so.6: cannot open shared object file); "
            "see fastcnn doctor",
        ),
        ("jinja2", ["compare", "a", "b"], "jinja2 cannot be imported (module 'collections' has"),
        (
            "onnx",
            ["export", "no/such/run", "--format", "onnx"],
            "--format onnx: the package onnx cannot be imported (Descriptors cannot be created "
            "directly); pip install 'fastcnn[export]'",
        ),
    ],
)
def test_the_option_that_needs_it_says_what_to_do(tmp_path, own_cache, name, words, expected):
    where = ["--output", str(tmp_path / "runs")] if words[0] == "train" else []
    code, lines = ended(tmp_path, [name], *words, *where)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"fastcnn: {expected}")
    assert not (tmp_path / "runs").exists()


def test_images_in_files_need_pillow(tmp_path, root, own_cache):
    words = ["train", "--data", str(write_folder(root)), "--output", str(tmp_path / "runs")]
    code, lines = ended(tmp_path, ["PIL"], *words)
    assert code == 2
    gone = "cannot be imported (libjpeg.so.9: cannot open shared object file)"
    assert lines[-1] == f"fastcnn: PIL {gone}; see fastcnn doctor"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise KeyError", "^planted cannot be imported \\(KeyError\\); see fastcnn doctor$"),
        ("import gone_too", "^planted cannot be imported \\(No module named 'gone_too'\\)"),
        (None, "^planted is missing; see fastcnn doctor$"),
    ],
)
def test_missing_and_broken_are_told_apart(tmp_path, monkeypatch, text, expected):
    monkeypatch.syspath_prepend(tmp_path)
    if text:
        (tmp_path / "planted.py").write_text(text)
    with pytest.raises(PackageError, match=expected) as caught:
        require("sys", "planted.deeper")
    assert (caught.value.exit_code, caught.value.name) == (2, "planted")
