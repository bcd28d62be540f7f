"""Cases of the updates sgd_ and adam_, and one way to run one through any module that has them."""

import itertools
from dataclasses import dataclass, replace

import torch

LR, RATE = 0.0625, 0.25  # exact in fp32, and small enough to tell a step from a doubled one
SGD = {"decay": 0.0, "decoupled": False, "momentum": 0.0, "nesterov": False}
ADAM = {"decay": 0.0, "decoupled": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
RULES = {
    "sgd": ("sgd_", SGD),
    "sgd-l2": ("sgd_", SGD | {"decay": 0.1}),
    "sgd-decoupled": ("sgd_", SGD | {"decay": 0.1, "decoupled": True}),
    "momentum": ("sgd_", SGD | {"momentum": 0.9}),
    "momentum-l2": ("sgd_", SGD | {"momentum": 0.9, "decay": 0.1}),
    "momentum-decoupled": ("sgd_", SGD | {"momentum": 0.9, "decay": 0.1, "decoupled": True}),
    "nesterov": ("sgd_", SGD | {"momentum": 0.8, "nesterov": True}),
    "nesterov-l2": ("sgd_", SGD | {"momentum": 0.8, "nesterov": True, "decay": 0.1}),
    "adam": ("adam_", ADAM),
    "adam-l2": ("adam_", ADAM | {"decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}),
    "adamw": ("adam_", ADAM | {"decay": 0.1, "decoupled": True}),
    "adam-no-first-moment": ("adam_", ADAM | {"beta1": 0.0}),
}
# of parameters: scalars, none at all, tails of every width, channels-last, several chunks and tasks
SHAPES = [(64,), (), (0,), (1,), (5, 3), (3, 0, 2, 2), (8, 3, 3, 3), (16, 8, 1, 1), (33001,)]


@dataclass(frozen=True)
class Case:
    """A rule and what goes with it. factor, found_inf: None, or the tensor's value."""

    rule: str
    copies: torch.dtype | None = None
    averages: bool = False
    factor: float | None = None
    found_inf: float | None = None
    steps: float = 3.0

    def __str__(self):
        words = [self.rule] + [str(self.copies)[6:]] * (self.copies is not None)
        words += ["averages"] * self.averages
        words += [f"x{self.factor:g}"] if self.factor is not None else []
        words += [f"inf{self.found_inf:g}"] if self.found_inf is not None else []
        return "-".join(words)


def combinations(rule, copies):
    """A rule with everything that may go with it or not."""
    case = Case(rule)
    parts = itertools.product((None, copies), (False, True), (None, 0.375), (None, 0.0, 1.0))
    for kind, averages, factor, found_inf in parts if copies else [(None, True, 0.375, 0.0)]:
        yield replace(case, copies=kind, averages=averages, factor=factor, found_inf=found_inf)


def wide(dtype):
    """The dtype of parameters beside gradients of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arguments_of(case, dtype, device="cpu", shapes=SHAPES, offset=0, seed=0):
    """The arguments of the case's function by name, gradients in `dtype`, drawn in fp64 and
    rounded. 4-D tensors are channels-last; each starts `offset` values after an aligned address."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, dtype, positive=False):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        raw = torch.empty(values.numel() + offset, dtype=dtype, device=device)[offset:]
        order = (0, 2, 3, 1) if values.dim() == 4 else tuple(range(values.dim()))
        target = raw.view([shape[d] for d in order])
        target = target.permute(0, 3, 1, 2) if values.dim() == 4 else target
        return target.copy_(values.abs() if positive else values)

    def draw_all(dtype, positive=False):
        return [draw(shape, dtype, positive) for shape in shapes]

    name, settings = RULES[case.rule]
    weight = wide(dtype)
    found = {"params": draw_all(weight), "grads": draw_all(dtype)}
    if name == "sgd_":
        found["momenta"] = draw_all(weight) if settings["momentum"] else []
    else:
        found["exp_avgs"] = draw_all(weight)
        found["exp_avg_sqs"] = draw_all(weight, positive=True)
    found["copies"] = draw_all(case.copies) if case.copies else []
    found["averages"] = draw_all(weight) if case.averages else []
    found["rates"] = torch.tensor([LR, RATE], device=device)
    if name == "adam_":
        found["steps"] = torch.tensor(case.steps, device=device)
    for scalar in ("factor", "found_inf"):
        value = getattr(case, scalar)
        found[scalar] = None if value is None else torch.tensor(value, device=device)
    return found


def each(arguments, function):
    """The arguments with `function` of every tensor in the lists."""
    return {
        name: [function(t) for t in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }


def call(module, case, arguments):
    """The case's function of `module`, in place."""
    name, settings = RULES[case.rule]
    getattr(module, name)(**arguments, **settings)


def run(module, case, arguments):
    """The lists after a step, which works on copies of them."""
    after = each(arguments, torch.clone)
    call(module, case, after)
    return {name: value for name, value in after.items() if isinstance(value, list)}


def in_fp64(arguments):
    """The same values in fp64, copies as they are."""
    return each(arguments, lambda t: t.double()) | {"copies": arguments["copies"]}


def check_errors(found, truth, plain, arguments):
    """Error against fp64 at most twice plain torch's, plus one rounding unit: of the new values, or
    of the old ones, from which something as large may have been taken."""
    for name, tensors in truth.items():
        for i, true in enumerate(tensors):
            got, torchs = found[name][i], plain[name][i]
            assert got.dtype == torchs.dtype
            if true.numel() == 0:
                continue
            largest = max(t.double().abs().max() for t in (true, arguments[name][i]))
            unit = torch.finfo(got.dtype).eps * largest
            error, allowed = ((t.double() - true).abs().max() for t in (got, torchs))
            words = f"{name}[{i}] {list(true.shape)}: {error:.3g}, torch {allowed:.3g}"
            assert error <= 2 * allowed + unit, words
