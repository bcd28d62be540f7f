"""No buffer is read before it is written: a run is the same with all of them filled with NaN.

torch does so in its deterministic mode, for its own buffers and the library's alike, unless it is
told not to, as `--deterministic` does. Integers are filled with their largest value.
"""

import pytest
import torch
from small_runs import assert_same, final_state, start

from fastcnn.train import setup
from fastcnn.train.host import make_deterministic

EVERYTHING = {"ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "clip_grad": 1.0, "cutout": 6}
OPTIONS = {
    "everything": {"optimizer": "sgd", "lr": 0.02, "test_flip": True, **EVERYTHING},
    "bf16": {"amp": True, **EVERYTHING},
    "adam": {"optimizer": "adam", "lr": 1e-3, "rotation": 10.0, "color_jitter": 0.3},
    "residuals": {"arch": "resnet18", "train_subset": 24, "test_subset": 8, "amp": True},
    "no norm": {"arch": "mao-default", "val_fraction": 0.2, "loader": "torch", "workers": 0},
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch, library):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def run_with(fill, monkeypatch, folder, **options):
    def deterministic():
        make_deterministic()
        torch.utils.deterministic.fill_uninitialized_memory = fill

    monkeypatch.setattr(setup, "make_deterministic", deterministic)
    run = start(folder, f"fill {fill}", deterministic=True, epochs=1, **options)
    assert torch.empty(9).isnan().all() or not fill
    return final_state(run.folder.path)


def assert_fill_changes_nothing(monkeypatch, folder, **options):
    plain, filled = (run_with(fill, monkeypatch, folder, **options) for fill in (False, True))
    assert_same(filled, plain)


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_run_is_the_same_with_every_new_buffer_full_of_nan(
    tmp_path, monkeypatch, backend, options
):
    assert_fill_changes_nothing(monkeypatch, tmp_path, backend=backend, **options)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [*OPTIONS.values(), {"amp": True, "conv": "fused"}], ids=[*OPTIONS, "convolutions"]
)
def test_the_same_of_the_kernels_workspaces(tmp_path, monkeypatch, options):
    options = {"device": "cuda", "backend": "fused", **options}
    assert_fill_changes_nothing(monkeypatch, tmp_path, **options)
