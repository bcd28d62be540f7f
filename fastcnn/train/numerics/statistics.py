"""The running statistics of a network's norms."""

from torch import Tensor, nn

ALIGNMENT = 16  # values: what starts at a multiple of 64 bytes takes the wide loads of every kernel


def statistics(model: nn.Module) -> list[Tensor]:
    """The floating-point buffers; the others, counts of batches, stand still in these networks."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def in_one(model: nn.Module) -> Tensor | None:
    """Lay the statistics of `model` side by side in one tensor, of which its buffers become views.

    Return that tensor, (n,), so that one launch reads or writes all of them; None without norms.
    """
    own = statistics(model)
    if not own:
        return None
    places, end = {}, 0
    for tensor in own:
        places[id(tensor)] = end
        end += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    whole = own[0].new_zeros(end)
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):
            if id(tensor) in places:
                start = places[id(tensor)]
                view = whole[start : start + tensor.numel()].view(tensor.shape)
                module._buffers[name] = view.copy_(tensor)
    return whole
