"""The network that is exported, torchvision's names for a VGG, and the check of a written file."""

import numpy as np
import pytest
import safetensors.torch
import torch
from test_export_zoo import close, compared, logits, pixels_of, trained_like
from torchvision.models import vgg

from fastcnn.config import DataConfig
from fastcnn.data import Normalization, load_dataset
from fastcnn.errors import UsageError
from fastcnn.export import check, safetensors_file
from fastcnn.export.network import Exported, exported_network, traced

# The network that is exported


MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)
BY_DEFINITION = {
    "zscore": lambda x, mean: (x / 255 - np.array(MEAN)) / np.array(STD),
    "unit": lambda x, mean: x / 255,
    "centered": lambda x, mean: x / 255 - 0.5,
    "mean-image": lambda x, mean: x / 255 - mean,
    "levels": lambda x, mean: x - 255 * np.array(MEAN),
}


@pytest.mark.parametrize("mode", BY_DEFINITION)
def test_pixels_are_normalised_inside(mode):
    pixels = pixels_of(4)
    mean = np.random.default_rng(5).random((4, 4, 3))
    normalization = Normalization(mode, MEAN, STD, mean.tolist() if mode == "mean-image" else None)
    network = Exported(torch.nn.Identity(), normalization, 4)
    found = network(torch.from_numpy(pixels))
    true = BY_DEFINITION[mode](pixels.astype(np.float64), mean).transpose(0, 3, 1, 2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, true, rtol=1e-6, atol=1e-6)
    # to the bit what the loaders give
    assert torch.equal(found, normalization.apply(torch.from_numpy(pixels)).permute(0, 3, 1, 2))


def test_the_trace_holds_torchs_own_operations_alone():
    program = traced(exported_network(trained_like("tiny-f"), True))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets
    assert all(target.startswith("aten.") for target in targets)
    assert not any("batch_norm" in target or "dropout" in target for target in targets)
    # nor a word of the device that it was made on
    assert not any(
        "assert" in target or "cpu" in str(n.kwargs)
        for target in targets
        for n in program.graph.nodes
    )
    assert {n.op for n in program.graph.nodes} == {"placeholder", "call_function", "output"}


def test_any_batch_in_any_memory_format():
    trained = trained_like("cnn-a+norm")
    network = traced(exported_network(trained, False)).module()
    images = torch.randn(5, 3, 32, 32)
    true = logits(trained.model, images)
    for given in (images, images.to(memory_format=torch.channels_last)):
        for count in (1, 2, 5):
            assert close(logits(network, given[:count]), true[:count])


def test_what_is_exported_leaves_the_network_as_it_is():
    trained = trained_like("murgolo-improved")
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    network = exported_network(trained, True)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(1)
    after = trained.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.full
def test_normalised_images_in_and_out_of_onnx(tmp_path):
    found, *_ = compared("mao-kernels", tmp_path, preprocess=True, count=3)
    assert found.passed
    assert found.batches == (1, 2)


# torchvision's names


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("arch", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_weights_load_into_torchvision(arch):
    trained = trained_like(arch)
    weights = safetensors_file.weights_of(trained, "torchvision")
    content = safetensors_file.encode(weights, {})
    with torch.device("meta"):  # 140 million weights that nothing needs
        theirs = getattr(vgg, f"{arch}_bn")(init_weights=False).eval()
    loaded = safetensors.torch.load(content)
    names = {name for name in theirs.state_dict() if name.startswith("features.")}
    assert loaded.keys() == names
    features = {name.removeprefix("features."): tensor for name, tensor in loaded.items()}
    theirs.features.load_state_dict(features, strict=True, assign=True)
    if arch != "vgg16":
        return
    ours = torch.nn.Sequential(*[m for n, m in trained.model.named_children() if "conv" in n])
    images = check.normalised(torch.from_numpy(pixels_of(32, 2)), trained.normalization)
    found, true = theirs.features(images), ours(images)
    assert found.shape == true.shape == (2, 512, 1, 1)
    assert true.abs().max() > 0.1
    assert (found - true).abs().max() < 1e-5


def test_torchvisions_file_is_checked_by_torchvision(tmp_path):
    trained = trained_like("vgg11")
    weights = safetensors_file.weights_of(trained, "torchvision")
    for place, expected in (("features.0.weight", False), ("features.0.bias", False), (None, True)):
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        if place:
            changed[place] += 0.01
        path = tmp_path / "vgg11.safetensors"
        path.write_bytes(safetensors_file.encode(changed, {}))
        written = safetensors_file.torchvision_reader(path, trained)
        assert check.compare(trained, written, pixels_of(32), False).passed is expected


def test_resnets_other_stem_is_said():
    with pytest.raises(UsageError, match=r"no resnet18 of this shape; its stem is 7x7, ours 3x3"):
        safetensors_file.weights_of(trained_like("resnet18"), "torchvision")


# The check


def test_a_norm_of_another_eps_is_noticed():
    trained = trained_like("murgolo-improved")
    for eps, passed in ((1e-5, True), (1e-3, False)):
        other = trained_like("murgolo-improved").model
        other.conv1.norm.eps = eps
        found = check.compare(trained, other, pixels_of(32), False)
        assert found.passed is passed
        assert (found.error == 0) is passed


def test_the_comparison_counts():
    trained = trained_like("cnn-a")
    true = torch.from_numpy(
        logits(
            trained.model, check.normalised(torch.from_numpy(pixels_of(32)), trained.normalization)
        )
    )
    worst = true.argmax(1)[9]

    def off(images):
        # of the last of ten images, the best class becomes the worst
        result = trained.model(images)
        if len(images) == 2:
            result[1, worst] -= 7
        return result

    found = check.compare(trained, off, pixels_of(32), False)
    assert found.error == pytest.approx(7)
    assert found.scale == pytest.approx(true.abs().max().item())
    assert found.relative == found.error / found.scale
    assert found.equal == 0.9
    assert not found.passed
    nan = check.compare(trained, lambda x: trained.model(x) * float("nan"), pixels_of(32), False)
    assert not nan.passed


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(1, [1]), (5, [1, 4]), (8, [1, 7]), (256, [1, 7, 248]), (600, [1, 7, 256, 256, 80])],
)
def test_batches_differ_in_size(images, sizes):
    assert list(check.batch_sizes(images)) == sizes


def test_images_are_drawn_from_all_classes():
    test = load_dataset(DataConfig(data="digits"), 32).test
    drawn = check.drawn(test, 64, 0)
    assert drawn.shape == (64, 32, 32, 3)
    assert np.array_equal(drawn, check.drawn(test, 64, 0))
    assert not np.array_equal(drawn, check.drawn(test, 64, 1))
    assert not np.array_equal(drawn, test.pixels_of(range(64)))
    assert len(check.drawn(test, 10**6, 0)) == len(test)
