"""Every network of the zoo as ONNX, run by onnxruntime, against the network in plain torch."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import STRUCTURES
from test_fold import RARE, draw_norms

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.config import Config, ModelConfig
from fastcnn.data import Normalization
from fastcnn.export import check, onnx_file
from fastcnn.export.network import exported_network
from fastcnn.train.checkpoints.load_run import TrainedModel

pytestmark = pytest.mark.full

# one of each structure: a bias before the activation; even kernels that pad on one side alone, of
# 64x64 images; 3x3 pools of stride 2; a norm behind a leaky ReLU; a norm in the classifier;
# residuals and a mean over pixels; all of it at once
NORMALIZATION = Normalization("zscore", (0.5, 0.45, 0.4), (0.25, 0.24, 0.26))


def named(network):
    return network if isinstance(network, str) else network.name


def trained_like(network):
    """A network with norms and weights that let what an image shows through to the logits."""
    records = get_network(network) if isinstance(network, str) else network
    size = records.image_sizes[0]
    config = Config(model=ModelConfig(arch=named(network)))
    classes = tuple("0123456789")
    model = build(records, size, 10, "torch").eval()
    initialise(model, "he", torch.Generator().manual_seed(1))
    draw_norms(model)
    return TrainedModel(model, config, classes, size, NORMALIZATION, {}, Path("last.pt"))


def pixels_of(size, count=10, seed=3):
    """Coloured squares, so that images differ in more than noise."""
    squares = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return squares.repeat(size // 4, 1).repeat(size // 4, 2)


@torch.no_grad()
def logits(network, images):
    return network(images).numpy()


def close(found, true):
    return np.abs(np.asarray(found) - true).max() < 2e-6 * np.abs(true).max()


def compared(network, folder, preprocess=False, count=10):
    trained = trained_like(network)
    path = folder / "network.onnx"
    path.write_bytes(onnx_file.encode(exported_network(trained, preprocess), {}))
    pixels = pixels_of(trained.image_size, count)
    found = check.compare(trained, onnx_file.reader(path), pixels, preprocess)
    with torch.no_grad():
        images = check.normalised(torch.from_numpy(pixels), trained.normalization)
        spread = trained.model(images).std(0).max().item()
    return found, onnx.load(path), spread


def judge(network, folder):
    found, model, spread = compared(network, folder)
    # else a fault in an early layer would not be seen
    assert spread > 0.03 * found.scale
    assert found.batches == (1, 7, 2)
    # of the tolerance, which allows for networks that training has left in odd places, a tenth
    assert found.relative < check.TOLERANCE / 10
    assert found.equal == 1
    kinds = {node.op_type for node in model.graph.node}
    # a bias is in its product, and a norm that directly follows one too
    assert ("BatchNormalization" in kinds) == (network == "mao-batchnorm")
    assert ("Add" in kinds) == (network in ("resnet18", RARE))
    return found


@pytest.mark.parametrize("network", [*STRUCTURES, RARE], ids=named)
def test_each_structure_computes_the_same(network, tmp_path):
    judge(network, tmp_path)
