"""The fused convolution and its gradients on odd shapes, small enough for compute-sanitizer.

    compute-sanitizer --tool racecheck python benchmarks/sanitize_conv.py [cuda|cpu]

The shapes reach every way of loading taps, whole and partial tiles, and blocks that take more than
one; inputs are plain and pending. Results are compared with plain torch's on the CPU, loosely: the
tests judge precision.
"""

import sys
from pathlib import Path

sys.path.extend(
    str(Path(__file__).parents[1].resolve() / "tests" / folder)
    for folder in ("", "ops", "ops/conv")
)
import conv_cases
import torch
from conv_cases import ConvCase
from torch.nn import functional as F

from fastcnn import ops

DTYPES = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
GEOMETRIES = [
    ((2, 3, 6, 5), 4, (3, 3), 1, (1, 1, 1, 1)),
    ((3, 17, 9, 7), 24, (2, 2), 1, (0, 1, 0, 1)),
    ((3, 40, 9, 7), 72, (3, 3), 2, (1, 1, 1, 1)),
    ((2, 64, 9, 9), 96, (1, 1), 1, (0, 0, 0, 0)),
    ((17, 8, 64, 64), 8, (3, 3), 1, (1, 1, 1, 1)),  # more tiles than blocks
]
CASES = [ConvCase(*g, pending) for g in GEOMETRIES for pending in ("plain", "norm", "bias")]
SLOPE = 0.1
SMALL_DIFFERENCE = 0.1  # mean over mean value: windows that low precision decides otherwise


def ours(case, t):
    """The product with its statistics, the pooled activation, and inference's single kernel."""
    pending = conv_cases.pending_of(case, t)
    geometry, own = (case.stride, case.pads), (True, True)
    y, partials = torch.ops.fastcnn.conv(
        pending.x, t["filter"], t["bias"], *pending[1:], *geometry, 1.0, *own
    )
    pooled, _ = torch.ops.fastcnn.conv_bias_act_pool(
        pending.x, t["filter"], t["bias"], *pending[1:], SLOPE, *geometry, *own
    )
    with torch.no_grad():
        affine = (t["bias"], t["bias"], t["bias"], y.detach(), 1.0, SLOPE)
        made = pending.applied()
        known = torch.ops.fastcnn.conv_affine_act(made, t["filter"], *affine, *geometry, False)
    return y, pooled, known, mean_of(partials)


def mean_of(partials):
    means, _, counts = partials
    return (means * counts).sum(0) / counts.sum(0)


def torchs(case, t):
    y = conv_cases.product_in_torch(case, t)
    pooled = F.max_pool2d(F.leaky_relu(y, SLOPE), 2)
    bias = t["bias"].view(-1, 1, 1)
    known = F.leaky_relu(y * bias + bias + y, SLOPE).detach()
    return y, pooled, known, y.detach().mean((0, 2, 3))


def results(case, call, tensors):
    """The results and the gradients of the first two, by name."""
    names = ["x", "filter", "bias"] + ["in_weight"] * (case.pending == "norm")
    names += ["in_bias"] * (case.pending != "plain")
    t = {
        name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in tensors.items()
    }
    for name in names:
        t[name].requires_grad_()
    y, pooled, known, mean = call(case, t)
    found = {"y": y, "pooled": pooled, "known": known, "mean": mean}
    for result, dy in ((y, t["dy"]), (pooled, torch.ones_like(pooled))):
        wanted = [t[name] for name in names]
        gradients = torch.autograd.grad(result, wanted, dy, retain_graph=True)
        found |= {
            f"d{n} of {tuple(result.shape)}": g for n, g in zip(names, gradients, strict=True)
        }
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def differences(case, device, dtype):
    """Return the mean difference from plain torch in fp64 over its mean value, by tensor."""
    inputs = conv_cases.tensors_of(case, dtype)
    got = results(case, ours, {name: t.to(device) for name, t in inputs.items()})
    want = results(case, torchs, {name: t.double() for name, t in inputs.items()})
    return {
        name: ((got[name] - true).abs().mean() / (true.abs().mean() + 1e-30)).item()
        for name, true in want.items()
    }


def main(device: str) -> int:
    ops.load()
    wrong = [
        f"{case} {dtype} {name}: {difference}"
        for dtype in DTYPES[device]
        for case in CASES
        for name, difference in differences(case, device, dtype).items()
        if not difference < SMALL_DIFFERENCE
    ]
    print(f"{len(CASES)} convolutions on {device}, with gradients, pool and inference")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
