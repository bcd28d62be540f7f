"""Batch norm over several processes: its cases, and the program whose processes run them.

python across_cases.py FOLDER: three processes run every case, each on its shard of the batch, and
write what they find to FOLDER/<rank>.pt.
"""

import contextlib
import dataclasses
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from op_cases import EPS, MOMENTUM, Case, run, tensors_of
from torch import nn
from torch.nn import functional as F

from fastcnn import ops
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.archs.layers import synchronise
from fastcnn.archs.spec import Conv, Linear, Network, Pool, Residual
from fastcnn.ops import conv_autotune, norm_across, reference

RANKS = 3
MODULES = {"fused": ops, "torch": reference}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# by image: what a backward or a forward has a part of on every process; the rest is summed
BY_IMAGE = ("y", "dx", "dresidual")


@dataclass(frozen=True)
class Sharded:
    """A case whose images lie on so many processes, so many on each."""

    case: Case
    shards: tuple[int, ...]
    mean: float = 0.0  # of x

    def __str__(self):
        words = [str(self.case), "on", "+".join(map(str, self.shards))]
        return "-".join(words + [f"mean{self.mean:g}"] * bool(self.mean))

    def tensors(self, dtype):
        """Those of the whole batch."""
        whole = tensors_of(self.case, dtype)
        return whole | {"x": whole["x"] + self.mean}

    def images(self, rank):
        return slice(sum(self.shards[:rank]), sum(self.shards[: rank + 1]))


def sharded_kinds(shape, *shards):
    cases = [
        Case(shape, pre_slope=0.2, post_slope=0.1),
        Case(shape, residual=True, post_slope=0.0),
        Case(shape, training=False, residual=True, pre_slope=0.01),
    ]
    if len(shape) == 4:
        cases += [
            Case(shape, pool=(2, 2, 0), post_slope=0.0),
            Case(shape, pool=(3, 2, 1), pre_slope=0.2, post_slope=0.1),
            Case(shape, pool=(2, 2, 0), training=False),
        ]
    return [Sharded(case, images) for case in cases for images in shards]


CASES = [
    *sharded_kinds((6, 17, 5, 3), (4, 2), (3, 2, 1)),
    *sharded_kinds((5, 64, 4, 4), (4, 1), (2, 0, 3)),
    *sharded_kinds((7, 100), (6, 1), (1, 4, 2)),  # one value a channel on a process
    *sharded_kinds((5, 8), (1, 4), (1, 1, 3)),
    # a variance as the mean of squares less the square of the mean would cancel
    Sharded(Case((6, 24, 4, 4), post_slope=0.0), (4, 2), mean=30.0),
]
PLANTED = Sharded(Case((6, 17, 5, 3), pre_slope=0.2, post_slope=0.1), (4, 2))
ONE_VALUE = Sharded(Case((1, 8)), (1, 0))
# of which fp32 says nothing: dx is what is left of terms that cancel, or nothing
EXTREMES = [*sharded_kinds((2, 8), (1, 1)), Sharded(Case((0, 8, 3, 3)), (0, 0))]


def call(module, case, t, across=None):
    """The op of `module` that a case with norm describes, over processes."""
    arguments = [t[name] for name in ("x", "weight", "bias", "running_mean", "running_var")]
    rest = (case.training, MOMENTUM, EPS, case.pre_slope, case.post_slope)
    if case.pool:
        return module.bn_act_pool(*arguments, *rest, case.pool, across=across)
    return module.bn_act(*arguments, *rest, t.get("residual"), across=across)


# errors that must be seen


def local_count(dweight, dbias, share, across):
    """The sums of all, divided by the number of values on this process."""
    sums = torch.stack([dweight, dbias])
    dist.all_reduce(sums, group=across)
    return sums.unbind()


def local_sums(dweight, dbias, share, across):
    return dweight, dbias


def means_of_means(partials, count, *rest):
    """Every process's mean counts alike, whatever the number of its values."""
    partials = partials.clone()
    partials[2] = partials[2].mean(0)
    return torch.ops.fastcnn.bn_stats_merge(partials, count, *rest)


def mean_of_variances(partials, count, *rest):
    """The processes' means are taken for one."""
    partials = partials.clone()
    partials[0] = (partials[0] * partials[2]).sum(0) / partials[2].sum(0)
    return torch.ops.fastcnn.bn_stats_merge(partials, count, *rest)


def merging(planted):
    fused = {name: getattr(torch.ops.fastcnn, name) for name in ops.OP_NAMES}
    return {"_ops": types.SimpleNamespace(**fused | {"bn_stats_merge": planted})}


PLANTS = {
    "local count": {"_of_all": local_count},
    "local sums": {"_of_all": local_sums},
    "means of means": merging(means_of_means),
    "mean of variances": merging(mean_of_variances),
}


# a network

LAYERS = (
    Conv(8, 3, norm=True, post_slope=0.0),
    Conv(8, 3, norm=True, pre_slope=0.1, pool=Pool()),
    Conv(4, 3, post_slope=0.1),
    Residual(8, stride=2),
    Linear(12, norm=True, post_slope=0.0),
    Linear(0),
)
NETWORK = Network("small", "", (8,), 10, LAYERS)
NETWORK_SHARDS = (3, 2)
LABELS = torch.arange(sum(NETWORK_SHARDS))


def network_and_images(backend):
    """In fp64, whose images are those of all processes."""
    generator = torch.Generator().manual_seed(0)
    model = build(NETWORK, 8, 10, backend).double()
    initialise(model, "he", generator)
    shape = (sum(NETWORK_SHARDS), 3, 8, 8)
    images = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return model, images.to(memory_format=torch.channels_last)


def step(model: nn.Module, images, labels):
    """Logits by image, gradients of the summed loss, running statistics."""
    logits = model(images)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    running = {n: b for n, b in model.named_buffers() if "running" in n}
    return {"y": logits.detach()} | found | running


@contextlib.contextmanager
def everything_fused():
    """As on a GPU whose every plan is "fused"."""
    with (
        mock.patch.object(conv_autotune, "plan_for", return_value=conv_autotune.FUSED),
        mock.patch.object(conv_autotune, "may_defer", return_value=True),
    ):
        yield


# what a process does


def run_sharded(sharded, dtype, module, rank, across):
    t = sharded.tensors(dtype)
    own = sharded.images(rank)
    t |= {name: t[name][own] for name in ("x", "dy", "residual") if name in t}
    case = dataclasses.replace(sharded.case, shape=tuple(t["x"].shape))
    return run(module, case, t, lambda *given: call(*given, across=across))


def refusal(sharded, module, rank, across):
    try:
        run_sharded(sharded, torch.float32, module, rank, across)
    except ValueError as error:
        return str(error)
    return ""


def run_network(backend, rank, across):
    model, images = network_and_images(backend)
    synchronise(model, across)
    own = slice(sum(NETWORK_SHARDS[:rank]), sum(NETWORK_SHARDS[: rank + 1]))
    return step(model, images[own], LABELS[own])


def run_all(rank, groups):
    """What this process finds, by the words that name it."""
    found = {}
    for backend, module in MODULES.items():
        for sharded in [*CASES, *EXTREMES]:
            across = groups[len(sharded.shards)]
            for dtype in DTYPES if rank < len(sharded.shards) else ():
                key = f"{backend} {dtype} {sharded}"
                found[key] = run_sharded(sharded, dtype, module, rank, across)
        if rank < 2:
            found[f"{backend} one value"] = refusal(ONE_VALUE, module, rank, groups[2])
            found[f"{backend} network"] = run_network(backend, rank, groups[2])
    for name, planted in PLANTS.items() if rank < 2 else ():
        with mock.patch.multiple(norm_across, **planted):
            found[name] = run_sharded(PLANTED, torch.float64, ops, rank, groups[2])
    if rank < 2:
        with everything_fused():
            found["everything fused"] = run_network("fused", rank, groups[2])
    return found


def process(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    groups = {2: dist.new_group([0, 1]), RANKS: dist.group.WORLD}
    torch.save(run_all(rank, groups), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ops.load()
    # forked: torch takes seconds to import
    torch.multiprocessing.start_processes(process, (Path(sys.argv[1]),), RANKS, start_method="fork")
