"""What CUDA has an operation for, known without a GPU; and what operations were run, with which.

By torch's own table of operators (op_db: `dtypesIfCUDA`, which torch's tests hold to its kernels),
and for what that lacks by the kernels in the CUDA library, whose names carry their dtype.
"""

import mmap
import re
from functools import cache
from pathlib import Path

import torch
from graph_twin import cannot_be_captured, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch_tables import import_tables

from fastcnn import ops

# what computes nothing: memory is laid out, shared or copied, whatever lies in it
BLIND = {
    "_local_scalar_dense",
    "_to_copy",
    "_unsafe_view",
    "clone",
    "copy_",
    "empty_like",
    "set_",
}
# what op_db has under the name of the public function, or as the gradient of one
FORWARD = {
    "_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "constant_pad_nd": "nn.functional.pad",
    "convolution": "nn.functional.conv2d",
    "index": "__getitem__",
    "leaky_relu": "nn.functional.leaky_relu",
    "max_pool2d_with_indices": "nn.functional.max_pool2d",
    "nll_loss_forward": "nn.functional.nll_loss",
    "relu": "nn.functional.relu",
    "upsample_bilinear2d": "nn.functional.interpolate",
}
BACKWARD = {
    "_log_softmax_backward_data": "log_softmax",
    "convolution_backward": "nn.functional.conv2d",
    "leaky_relu_backward": "nn.functional.leaky_relu",
    "max_pool2d_with_indices_backward": "nn.functional.max_pool2d",
    "native_batch_norm_backward": "nn.functional.batch_norm",
    "nll_loss_backward": "nn.functional.nll_loss",
    "slice_backward": "slice",
    "threshold_backward": "nn.functional.relu",
}
# a kernel's name in the CUDA library; T: the dtype as a C++ compiler mangles it
KERNELS = {
    "_fused_sgd_": rb"FusedSgdMathFunctorI(?:N3c10)?T",
    "_amp_update_scale_": rb"amp_update_scale_cuda_kernelEPTPiPKT",
    "_amp_foreach_non_finite_check_and_unscale_": (
        rb"UnaryOpFunctorI(?:N3c10)?T[^\0]{1,40}_amp_foreach_non_finite_check_and_unscale_cuda_"
    ),
}
MANGLED = {
    torch.float64: b"d",
    torch.float32: b"f",
    torch.float16: b"4Half",
    torch.bfloat16: b"8BFloat16",
}


class Recorder(TorchDispatchMode):
    """`seen`: (operation, dtype) of all calls; `uncaptured`: operations no capture allows."""

    def __init__(self):
        super().__init__()
        self.seen, self.uncaptured = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        given = [t.dtype for t in tensors(args) + tensors(kwargs)]
        numbers = [dtype for dtype in given if dtype.is_floating_point] or given
        if not function.is_view and name.startswith(("aten::", "fastcnn::")):
            self.seen |= {(name, dtype) for dtype in numbers}
        # a tensor made of numbers on the host: it would come to the device from pageable memory
        if cannot_be_captured(function, args) or name == "aten::lift_fresh":
            self.uncaptured.add(name)
        return function(*args, **kwargs)


@cache
def operators():
    """Torch's tables by the names of their operations."""
    tables = import_tables()
    found: dict[str, list] = {}
    every = [tables.op_db, tables.foreach_unary_op_db, tables.foreach_binary_op_db]
    every += [tables.foreach_pointwise_op_db, tables.foreach_reduce_op_db]
    every += [tables.foreach_other_op_db]
    for info in (info for table in every for info in table):
        for name in {info.name, info.aten_name}:
            found.setdefault(name, []).append(info)
    return found


@cache
def has_kernel(pattern: bytes) -> bool:
    """Whether the CUDA library has a kernel of such a name."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return re.search(pattern, text) is not None


def cuda_has(operation: str, dtype: torch.dtype) -> bool:
    """Whether it can be shown that CUDA has the operation in this dtype."""
    namespace, name = operation.split("::")
    if namespace == "fastcnn":
        return dtype in ops.DTYPES["cuda"] or not dtype.is_floating_point
    if name in BLIND:
        return True
    if name in KERNELS:
        return dtype in MANGLED and has_kernel(KERNELS[name].replace(b"T", MANGLED[dtype]))
    if name in BACKWARD:
        return any(dtype in info.backward_dtypesIfCUDA for info in operators()[BACKWARD[name]])
    # what happens in place has the table's row of what does not
    for known in (FORWARD.get(name, name), FORWARD.get(name.rstrip("_"), name.rstrip("_"))):
        if any(dtype in info.dtypesIfCUDA for info in operators().get(known, ())):
            return True
    return False


def missing(seen):
    """What of `seen` cannot be shown to exist on CUDA, as text."""
    return sorted(f"{name} {str(dtype)[6:]}" for name, dtype in seen if not cuda_has(name, dtype))
