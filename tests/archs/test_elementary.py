"""The network operation by operation: the table's names and shapes, the layers' results."""

import pytest
import torch
from test_fold import NAMES, RARE, images_for, model_of

from fastcnn.archs import get_network
from fastcnn.archs.elementary import Elementary
from fastcnn.archs.fold import fold
from fastcnn.archs.spec import layer_table

# of the largest ones' millions of weights a few are enough: even kernels, norms, dropout
LARGE = {"vgg11", "vgg13", "vgg19", "tiny-b", "tiny-c", "tiny-d", "tiny-e"}
FEW = [name for name in NAMES if name not in LARGE]


@pytest.mark.full
@pytest.mark.parametrize("name", [*FEW, RARE], ids=[*FEW, "rare"])
@torch.no_grad()
def test_operations_are_those_of_the_table_and_compute_the_same(name):
    model = model_of(name).double()
    images = images_for(model, name, 2, torch.float64)
    twin = Elementary(model)
    network = RARE if name is RARE else get_network(name)
    rows = layer_table(network, images.shape[-1], 10)
    assert [step for step, _ in twin.steps] == [row.name for row in rows]
    outputs = twin.outputs(images, [row.name for row in rows])
    assert [tuple(o.shape[1:]) for o in outputs.values()] == [row.output_shape for row in rows]
    torch.testing.assert_close(twin(images), model(images), rtol=1e-10, atol=1e-10)
    # what a layer hands on is what its last operation gives
    last = {row.layer: row.name for row in rows}
    x = images
    for layer, module in model.named_children():
        x = module(x)
        torch.testing.assert_close(outputs[last[layer]], x, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_folded_network_has_fewer_operations_and_the_same_logits():
    model = model_of("resnet18").double()
    images = images_for(model, "resnet18", 1, torch.float64)
    twin = Elementary(fold(model))
    assert not any(name.startswith("BatchNorm") for name, _ in twin.steps)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-9, atol=1e-9)


def test_the_model_is_copied_and_left_as_it_is():
    model = model_of("murgolo-improved").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = Elementary(model)
    images = images_for(model, "murgolo-improved", 2)
    assert torch.equal(twin(images), twin(images))  # no dropout
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    for parameter in twin.parameters():
        parameter.zero_()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
