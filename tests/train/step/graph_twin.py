"""CUDA graphs without a GPU: operations recorded on the CPU and run again on the same memory.

As in a CUDA graph, a capture leaves no effect behind, a replay runs no Python of the work and hands
every operation the tensors and numbers of the capture, and what waits for the device cannot be
captured. So what goes wrong in a graph because it lies on the host goes wrong here.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what reads a value back, or has a size that depends on values
UNCAPTURED = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "equal"),
        *("_unique2", "bincount", "masked_select", "nonzero", "unique_consecutive", "unique_dim"),
    )
}
# writes that the schema does not tell: places of the arguments
UNTOLD_WRITES = {torch.ops.aten.native_batch_norm.default: (3, 4)}


def cannot_be_captured(function, args):
    """Whether a CUDA graph cannot hold the operation, as far as its name and arguments tell."""
    name = function._schema.name
    by_mask = name == "aten::index" and any(t.dtype == torch.bool for t in tensors(args[1]))
    return by_mask or name in UNCAPTURED


class CpuTwin:
    """A `fastcnn.train.graph.Recorder`; `captures` counts its graphs, `is_aside` says whether the
    work at hand is where captures are."""

    def __init__(self):
        self.captures = 0
        self.is_aside = False

    @contextmanager
    def aside(self):
        self.is_aside = True
        try:
            yield
        finally:
            self.is_aside = False

    def warm_up(self, work):
        work()

    def capture(self, work):
        generator = torch.get_rng_state()
        recording = Recording()
        try:
            with recording:
                work()
        finally:
            recording.undo()
            torch.set_rng_state(generator)
        self.captures += 1
        return recording.replay


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}
        self.inside = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if cannot_be_captured(function, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        self._keep(written_by(function, args, kwargs))
        results = function(*args, **kwargs)
        known = {address(t) for t in tensors(args) + tensors(kwargs)}
        self.inside |= {address(t) for t in tensors(results)} - known
        self.calls.append((function, args, kwargs, results))
        return results

    def _keep(self, written):
        for tensor in written:
            if address(tensor) not in self.inside and address(tensor) not in self.before:
                storage = tensor.untyped_storage()
                self.before[address(tensor)] = (storage, storage.clone())

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(tensors(results), tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def written_by(function, args, kwargs):
    """The tensors among the arguments that the operation writes to."""
    found = tensors([args[place] for place in UNTOLD_WRITES.get(function, ())])
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors(value)
    return found
