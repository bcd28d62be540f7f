"""Every op and its backward on odd shapes, and the updates, small enough for compute-sanitizer.

    compute-sanitizer --tool racecheck python benchmarks/sanitize_ops.py [cuda|cpu]

The shapes reach the vector and the scalar paths, several blocks and every pool of the tests; each
dtype with kernels has its turn. Results are compared with plain torch's on the CPU, so that the
tool sees few kernels but ours, and loosely: the tests judge precision.
"""

import itertools
import sys
from pathlib import Path

sys.path.extend(
    str(Path(__file__).parents[1].resolve() / "tests" / folder)
    for folder in ("", "ops", "ops/update")
)
import augment_cases
import nonfinite_cases
import torch
import update_cases
from op_cases import kinds, run, tensors_of

from fastcnn import ops
from fastcnn.ops import reference

SHAPES = [(3, 17, 5, 7), (2, 65, 9, 4), (2, 64, 9, 7), (5, 24, 31, 33), (7, 100)]
SLOPES = (0.2, 0.1)
SMALL_DIFFERENCE = 0.1  # mean over mean value: windows that low precision decides otherwise


def differences(case, device, dtype):
    """Return the mean difference from plain torch in fp64 over its mean value, by tensor."""
    inputs = tensors_of(case, dtype)
    got = run(ops, case, {name: t.to(device) for name, t in inputs.items()})
    want = run(reference, case, {name: t.double() for name, t in inputs.items()})
    return {
        name: ((got[name].cpu() - true).abs().mean() / (true.abs().mean() + 1e-30)).item()
        for name, true in want.items()
    }


def update_differences(rule, device, dtype):
    """Return the mean differences of an update from plain torch in fp64, summed over each list."""
    half = None if dtype == torch.float64 else torch.bfloat16
    case = update_cases.Case(rule, half, True, 0.375, 0.0)
    found = update_cases.run(ops, case, update_cases.arguments_of(case, dtype, device))
    inputs = update_cases.in_fp64(update_cases.arguments_of(case, dtype))
    sums = {}
    for name, tensors in update_cases.run(reference, case, inputs).items():
        for got, want in zip(found[name], tensors, strict=True):
            if want.numel():
                sums[name] = sums.get(name, 0.0) + (got.cpu() - want).abs().mean().item()
    return sums


def wrong_batches(device):
    """Name the calls of augment whose bits are not the oracle's."""
    cases = [*augment_cases.kinds(5, 7), *augment_cases.kinds(40, 32)]
    for case, dtype in itertools.product(cases, ops.DTYPES[device]):
        inputs = augment_cases.tensors_of(case)
        on_device = {name: t.to(device) for name, t in inputs.items()}
        got = augment_cases.call(ops, case, on_device, dtype)
        want = augment_cases.call(reference, case, inputs, dtype)
        if not all(torch.equal(t.cpu(), true) for t, true in zip(got, want, strict=True)):
            yield f"augment {case} {dtype}"


def wrong_looks(device):
    """Name the looks for inf and NaN that find none, or one where there is none."""
    grads = [
        nonfinite_cases.finite(dtype, shape, device, offset)
        for dtype in ops.DTYPES[device]
        for shape in update_cases.SHAPES
        for offset in (0, 1)
    ]
    for last, want in ((1.0, 0), (float("nan"), 1)):
        found_inf = torch.zeros((), device=device)
        ops.find_nonfinite_([*grads, torch.tensor([last], device=device)], found_inf)
        if found_inf != want:
            yield f"find_nonfinite_ with {last}: {found_inf.item()}"


def main(device: str) -> int:
    ops.load()
    cases = [case for shape in SHAPES for case in kinds(shape, *SLOPES)]
    wrong = [
        f"{case} {dtype} {name}: {difference}"
        for dtype in ops.DTYPES[device]
        for case in cases
        for name, difference in differences(case, device, dtype).items()
        if not difference < SMALL_DIFFERENCE
    ]
    wrong += [
        f"{rule} {dtype} {name}: {difference}"
        for dtype in ops.DTYPES[device]
        for rule in update_cases.RULES
        for name, difference in update_differences(rule, device, dtype).items()
        if not difference < SMALL_DIFFERENCE
    ]
    wrong += wrong_batches(device)
    wrong += wrong_looks(device)
    calls = len(cases) * len(ops.DTYPES[device])
    print(f"{calls} calls, forward and backward, on {device}, augment, updates", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
