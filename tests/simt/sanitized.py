"""Run every launcher on heap blocks of exactly the size its contract names.

A program of its own: python sanitized.py <simt_kernels compiled with SANITIZE>, under libasan.
"""

import importlib.util
import itertools
import random
import struct
import sys

SIZES = [(2, 3, 5, 17), (1, 2, 7, 24), (3, 1, 1, 3), (2, 5, 4, 32), (1, 4, 3, 1), (0, 2, 2, 8)]
# images: count, height, width; the rows of the last are vectors of every dtype
IMAGES = [(3, 5, 7), (1, 1, 1), (2, 9, 4), (5, 17, 24)]
POOLS = [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1), (4, 3, 2)]
# values of the tensors that are updated together: tails, two chunks and more, more than one table
COUNTS = [0, 1, 3, 4, 257, 4099, 8192, *[5] * 60]
# n, h, w, c, k, kernel, stride, pads (top, bottom, left, right): vectors and single values, tails
CONVS = [
    (2, 5, 6, 8, 24, (3, 3), 1, (1, 1, 1, 1)),
    (1, 4, 5, 3, 17, (2, 2), 2, (0, 1, 0, 1)),
    (1, 7, 3, 24, 8, (5, 5), 2, (2, 1, 0, 2)),
    (3, 1, 1, 17, 40, (1, 1), 1, (0, 0, 0, 0)),
    (0, 4, 4, 8, 8, (3, 3), 1, (1, 1, 1, 1)),
]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Heap:
    def __init__(self, kernels):
        self.kernels = kernels
        self.blocks = []

    def block(self, content):
        self.blocks.append(self.kernels.allocate(content))
        return self.blocks[-1]

    def output(self, size):
        return self.block(b"\xff" * size)

    def values(self, dtype, count):
        numbers = [random.gauss(0, 1) for _ in range(count)]
        if dtype == "float16":
            return self.block(struct.pack(f"{count}e", *numbers))
        raw = struct.pack(f"{count}f", *numbers)
        upper = bytes(byte for i, byte in enumerate(raw) if i % 4 > 1)
        return self.block(raw if dtype == "float32" else upper)

    def release(self):
        for block in self.blocks:
            self.kernels.release(block)


def run(kernels, sizes, dtype):
    heap = Heap(kernels)
    n, p, q, k = sizes
    count, item = n * p * q * k, ITEM_BYTES[dtype]
    common = {"sizes": sizes, "dtype": dtype}
    x = heap.values(dtype, count)
    running = {"running_mean": heap.values("float32", k), "running_var": heap.output(4 * k)}
    statistics = {"mean": heap.output(4 * k), "rstd": heap.output(4 * k)}
    workspace = {"workspace": heap.output(kernels.bn_stats_workspace(*sizes))}
    settings = {"momentum": 0.1, "eps": 1e-5, "pre_slope": 0.1}
    for training in (True, False):
        given = {"x": x, "training": training, **running, **statistics, **workspace}
        assert kernels.bn_stats(**common, **settings, **given) == 0

    slopes = {"pre_slope": 0.0, "post_slope": 0.1}
    affine = {**statistics, "weight": heap.values("float32", k), "bias": heap.values("float32", k)}
    y, residual = heap.output(count * item), heap.values(dtype, count)
    for added in ({}, {"residual": residual}):
        assert kernels.bn_act(**common, **slopes, **affine, **added, x=x, y=y) == 0

    sums = {"dweight": heap.output(4 * k), "dbias": heap.output(4 * k)}
    outputs = {"dx": heap.output(count * item), **sums}
    outputs["workspace"] = heap.output(kernels.bn_act_backward_workspace(*sizes))
    dresidual = heap.output(count * item)
    for batch in (True, False):
        given = {"x": x, "dy": residual, "y": y, "dresidual": dresidual, "batch_stats": batch}
        assert kernels.bn_act_backward(**common, **slopes, **affine, **given, **outputs) == 0
    for part in ("sums", "apply"):
        given |= {"part": part, "batch_stats": True}
        assert kernels.bn_act_backward(**common, **slopes, **affine, **given, **outputs) == 0

    for pool in POOLS:
        window, stride, padding = pool
        if min(p, q) + 2 * padding < window:
            continue
        rows, columns = ((s + 2 * padding - window) // stride + 1 for s in (p, q))
        pooled = n * rows * columns * k
        code, dy = heap.output(pooled), heap.values(dtype, pooled)
        given = {**common, **slopes, **affine, "pool": pool, "x": x, "code": code}
        assert kernels.bn_act_pool(**given, y=heap.output(pooled * item)) == 0
        for batch in (True, False):
            backward = {**given, **outputs, "dy": dy, "batch_stats": batch}
            assert kernels.bn_act_pool_backward(**backward) == 0
        for part in ("sums", "apply"):
            backward |= {"part": part, "batch_stats": True}
            assert kernels.bn_act_pool_backward(**backward) == 0
    heap.release()


def convolve(kernels, geometry, dtype, shift):
    """A convolution and its gradients with all that may be there; shift: values after a 16-byte
    boundary."""
    heap = Heap(kernels)
    n, h, w, c, k, (r, s), stride, (top, bottom, left, right) = geometry
    p = (h + top + bottom - r) // stride + 1
    q = (w + left + right - s) // stride + 1
    shape = (n, h, w, c, k, r, s, stride, top, left, p, q)

    def values(count):
        return heap.values(dtype, count + shift) + 2 * shift

    def output(count):
        return heap.output(2 * (count + shift)) + 2 * shift

    def vectors(count, *names):
        return {name: heap.values("float32", count) for name in names}

    plain = {"in_pre_slope": 1.0, "in_post_slope": 1.0}
    made = {"in_pre_slope": 0.1, "in_post_slope": 0.0}
    made |= vectors(c, "in_mean", "in_rstd", "in_weight", "in_bias")
    x, filters, dy = values(n * h * w * c), values(k * r * s * c), values(n * p * q * k)
    common = {"dtype": dtype, "shape": shape}
    result = {"pre_slope": 0.1, "post_slope": 0.0, **vectors(k, "bias", "scale", "shift")}
    pooled = n * (p // 2) * (q // 2) * k
    rows = kernels.conv_partial_rows(shape)
    for given in (plain, made):
        forward = {**common, **given, **result, "x": x, "filter": filters, "stats_slope": 0.1}
        partials = heap.output(12 * rows * k)
        y = output(n * p * q * k)
        assert kernels.conv(**forward, y=y, pool=False, partials=partials) == 0
        assert kernels.conv(**forward, y=y, pool=False, residual=dy) == 0
        statistics = vectors(k, "mean", "rstd", "running_mean", "running_var")
        sizes = {"rows": rows, "k": k, "count": n * p * q, "momentum": 0.1, "eps": 1e-5}
        assert kernels.bn_merge(partials=partials, **sizes, **statistics) == 0
        for code in ({}, {"code": heap.output(pooled)}):
            assert kernels.conv(**forward, y=output(pooled), pool=True, **code) == 0

        def workspace(op):
            return heap.output(kernels.conv_workspace(op=op, **common))

        gradient = {**common, **given, "x": x, "dy": dy}
        sums = {"dweight": heap.output(4 * c), "dbias": heap.output(4 * c)}
        for batch_stats in (False, True) if given is made else (False,):
            assert (
                kernels.conv_data_gradient(
                    **gradient,
                    filter=filters,
                    dx=output(n * h * w * c),
                    batch_stats=batch_stats,
                    workspace=workspace("conv_data_gradient"),
                    **(sums if given is made else {}),
                )
                == 0
            )
        assert (
            kernels.conv_weight_gradient(
                **gradient,
                dfilter=output(k * r * s * c),
                workspace=workspace("conv_weight_gradient"),
            )
            == 0
        )
    heap.release()


def augment(kernels, sizes, dtype):
    heap = Heap(kernels)
    count, h, w = sizes
    values = h * w * 3
    tensors = {
        "at": heap.block(struct.pack("2q", 1, 2)),
        "scale": heap.values("float32", 3),
        "fill": heap.values("float32", 3),
        "x": heap.output(count * values * ITEM_BYTES[dtype]),
        "y": heap.output(count * 8),
    }
    stored = {
        "images": heap.block(random.randbytes(4 * values)),
        "labels": heap.block(struct.pack("4q", *range(4))),
        "order": heap.block(struct.pack("3q", 3, 0, 3)),
        "gathered": False,
    }
    # as many images as the batch has, and sample numbers that lie far outside
    gathered = {
        "images": heap.block(random.randbytes(count * values)),
        "labels": heap.block(struct.pack(f"{count}q", *range(count))),
        "order": heap.block(struct.pack("3q", 2**40, 0, 2**33)),
        "gathered": True,
    }
    common = {"count": count, "h": h, "w": w, "dtype": dtype, "length": 3, "seed": 5}
    reflected = {"reflect": True, "padding": min(h, w) - 1}
    zero = {"reflect": False, "padding": 2 * max(h, w)}
    choices = ((0, 0, False), (1, 3, True), (2, 3 * w, False))
    for padded, source, choice in itertools.product((reflected, zero), (stored, gathered), choices):
        flip, cutout, of_pixels = choice
        given = {"flip": flip, "cutout": cutout, "bias_of_pixels": of_pixels}
        given["bias"] = heap.values("float32", values if of_pixels else 3)
        assert kernels.augment(**common, **tensors, **source, **padded, **given) == 0
    heap.release()


def update(kernels, dtype, shift):
    """Both updates with everything that may be there, and find_nonfinite_; shift: values after a
    16-byte boundary."""
    heap = Heap(kernels)

    def values(dtype, count):
        return heap.values(dtype, count + shift) + shift * ITEM_BYTES[dtype]

    half = "bfloat16" if dtype == "bfloat16" else "float16"
    tensors = [
        (count, *(values(t, count) for t in ("float32", dtype, *["float32"] * 2, half, "float32")))
        for count in COUNTS
    ]
    common = {"dtype": "float32", "grad_dtype": dtype, "copy_dtype": half, "decay": 0.1}
    for name in ("factor", "found_inf", "steps"):
        common[name] = heap.block(struct.pack("f", 1.0 if name == "steps" else 0.0))
    common["rates"] = heap.block(struct.pack("2f", 0.1, 0.2))
    for decoupled in (True, False):
        given = {**common, "tensors": tensors, "decoupled": decoupled}
        assert kernels.sgd_(**given, momentum=0.9, nesterov=True) == 0
        assert kernels.adam_(**given, beta1=0.9, beta2=0.99, eps=1e-8) == 0
    bare = [(*tensor[:3], 0, 0, 0, 0) for tensor in tensors]
    assert kernels.sgd_(**common, tensors=bare, decoupled=True, momentum=0, nesterov=False) == 0
    flat = [(count, dtype, values(dtype, count)) for count in COUNTS]
    assert kernels.find_nonfinite_(tensors=flat, found_inf=common["found_inf"]) == 0
    heap.release()


def main():
    spec = importlib.util.spec_from_file_location("simt_kernels", sys.argv[1])
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    random.seed(0)
    for sizes in SIZES:
        for dtype in ITEM_BYTES:
            run(kernels, sizes, dtype)
    for sizes in IMAGES:
        for dtype in ITEM_BYTES:
            augment(kernels, sizes, dtype)
    for dtype in ITEM_BYTES:
        for shift in (0, 1):
            update(kernels, dtype, shift)
    for geometry in CONVS:
        for dtype in ("float16", "bfloat16"):
            for shift in (0, 1):
                convolve(kernels, geometry, dtype, shift)


if __name__ == "__main__":
    main()
