"""torch.compile takes the fused networks as one graph, without breaks, and computes the same."""

import pytest
import torch
from torch.nn import functional as F

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.train.numerics.half import half_network


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture(autouse=True)
def _compile_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(call, model, images):
    torch.manual_seed(0)  # dropout
    logits = call(images)
    loss = F.cross_entropy(logits.float(), torch.arange(len(images)))
    return [logits, *torch.autograd.grad(loss, list(model.parameters()))]


def compared(name, number_format, backend, fused="fused"):
    network = NETWORKS[name]
    size = network.image_sizes[0]
    model = build(network, size, 10, fused)
    initialise(model, "he", torch.Generator().manual_seed(0))
    model, _ = half_network(model, number_format)
    images = torch.randn(4, 3, size, size).to(number_format or torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    wanted = results(model, model, images)
    return wanted, results(compiled, model, images)


FAMILIES = ["cnn-a", "murgolo-improved", "mao-batchnorm", "tiny-d", "vgg11", "resnet18"]


@pytest.mark.full
@pytest.mark.parametrize("number_format", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_traced_without_breaks(name, number_format):
    wanted, found = compared(name, number_format, "aot_eager")
    # the compiler splits some of torch's own operations, which in bf16 rounds once more
    most = 0.1 if number_format else 1e-5
    # a bias before a batch norm has no gradient but rounding
    least = 0.1 * max(gradient.float().norm() for gradient in wanted[1:])
    for mine, theirs in zip(found, wanted, strict=True):
        size = max(theirs.float().norm(), least)
        assert (mine.float() - theirs.float()).norm() <= most * size


@pytest.mark.full
def test_compiled_by_inductor():
    wanted, found = compared("mao-default", None, "inductor")
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
