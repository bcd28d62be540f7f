"""Registers and spills of the CUDA kernels, as ptxas reports them at the build.

`python tests/ops/native/test_ptxas.py` builds the library and writes the table in csrc/README.md.
"""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from fastcnn.ops.native import build, toolchain

pytestmark = pytest.mark.full

ARCHS = "8.0;9.0+PTX"
TARGETS = ("sm_80", "sm_90")
TYPES = {"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}
WIDE = {"f32": 4, "f16": 8, "bf16": 8}
README = Path(__file__).parents[3] / "csrc" / "README.md"
# a multiprocessor's 65,536 registers over 256 threads and so many blocks: kResident of walk.cuh,
# kBackwardResident of backward.cuh
MOST_FORWARD, MOST_BACKWARD = 65536 // 256 // 3 // 8 * 8, 65536 // 256 // 2
# so many blocks of 128 threads: kConvResident of conv.cuh, conv_resident() for those that load
# through registers
MOST_CONV, MOST_CONV_LOADING = 65536 // 128 // 4, 65536 // 128 // 3 // 8 * 8
# another patch of nvcc may choose a little differently
MARGIN = 8

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+)'")
FIGURES = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
KERNEL = re.compile(
    r"\d+((?:bn|conv)_[a-z_]+_kernel|augment_kernel|find_nonfinite_kernel)"
    r"(?:I(f|6__half|13__nv_bfloat16)((?:L(?:i|b|N\w*?(?:Pass|Taps)E)\d+E)*)E)?"
)
UPDATE = re.compile(r"\d+update_kernelI(f|6__half|13__nv_bfloat16)N\w*?_\d(Sgd|Adam)RuleE")
PASSES = ("reduce", "apply", "single")
TAPS = ("copied", "pending", "single values")  # Taps of conv.cuh


class Figures(NamedTuple):
    registers: int
    spilled: int  # bytes, stores and loads


def kernel_name(mangled: str) -> str:
    """bn_act_kernel<bf16, 8, 1> of its mangled name, as csrc/cuda/introspection.cu names it."""
    if update := UPDATE.search(mangled):
        return f"update_kernel<{TYPES[update[1]]}, {update[2].lower()}>"
    found = KERNEL.search(mangled)
    assert found, mangled
    name, number, rest = found.groups()
    if not number:
        return name
    arguments = re.findall(r"L(?:i|b|N\w*?(?:Pass|Taps)E)(\d+)E", rest)
    return f"{name}<{', '.join([TYPES[number], *arguments])}>"


def parse(log: str) -> dict[tuple[str, str], Figures]:
    """Figures by kernel and target, from the output of nvcc -Xptxas=-v."""
    figures = {}
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        entry, spilled, used = (r.search(part) for r in (ENTRY, FIGURES, REGISTERS))
        assert entry, part
        assert spilled, part
        assert used, part
        key = kernel_name(entry[1]), entry[2]
        figures[key] = Figures(int(used[1]), int(spilled[1]) + int(spilled[2]))
    return figures


def expected_kernels() -> set[str]:
    """Every instantiation there is to be."""
    names = {"bn_stats_finalise_kernel", "bn_stats_running_kernel"}
    names |= {"bn_act_backward_finalise_kernel", "find_nonfinite_kernel"}
    for number, wide in WIDE.items():
        names |= {f"update_kernel<{number}, {rule}>" for rule in ("sgd", "adam")}
        pools = [(wide, 2), (4, 3), (1, 0)]
        names |= {
            f"{op}_kernel<{number}, {v}>" for op in ("bn_stats", "augment") for v in (wide, 1)
        }
        for v, residual in itertools.product((wide, 1), (0, 1)):
            names.add(f"bn_act_kernel<{number}, {v}, {residual}>")
        names |= {f"bn_act_pool_kernel<{number}, {v}, {window}>" for v, window in pools}
        for i in range(3):
            names |= {f"bn_act_backward_kernel<{number}, {v}, {i}>" for v in (wide, 1)}
            for v, window in pools:
                names.add(f"bn_act_pool_backward_kernel<{number}, {v}, {window}, {i}>")
    return names | conv_kernels()


def conv_kernels() -> set[str]:
    names = set()
    for number, filters in itertools.product(("f16", "bf16"), (32, 64)):
        names |= {f"conv_bn_act_kernel<{number}, {filters}, {taps}>" for taps in range(3)}
        names |= {f"conv_data_gradient_kernel<{number}, {filters}, {taps}>" for taps in (0, 2)}
        names |= {f"conv_weight_gradient_kernel<{number}, {pending}>" for pending in (0, 1)}
        names |= {f"conv_{op}_kernel<{number}>" for op in ("turn_filters", "weight_gradient_sum")}
    return names


def most_registers(kernel: str) -> int:
    if not kernel.startswith("conv"):
        return MOST_BACKWARD if "backward" in kernel else MOST_FORWARD
    return MOST_CONV_LOADING if re.search(r", 64, [12]>$", kernel) else MOST_CONV


def row_of(kernel: str) -> tuple[str, str]:
    """The table's row for a kernel, and its type; "" for one without."""
    if "<" not in kernel:
        return kernel, ""
    name, arguments = kernel.rstrip(">").split("<")
    number, *rest = arguments.split(", ")
    if name.startswith("conv"):
        return ", ".join([name, *conv_words(name, rest)]), number
    width, *rest = rest
    if name == "update_kernel":
        return f"{name}, {width}", number
    words = ["1 value" if width == "1" else f"{int(width) * 4 // WIDE[number] * 4} bytes"]
    if "backward" in name:
        *rest, index = rest
        words.append(PASSES[int(index)])
    if "pool" in name:
        words.append("any window" if rest == ["0"] else f"window {rest[0]}")
    elif rest == ["1"]:
        words.append("residual")
    return f"{name}, {', '.join(words)}", number


def conv_words(name: str, arguments: list[str]) -> list[str]:
    if name == "conv_weight_gradient_kernel":
        return [TAPS[int(arguments[0])]]
    return [f"{arguments[0]} filters", TAPS[int(arguments[1])]] if arguments else []


def table(figures: dict[tuple[str, str], Figures]) -> list[str]:
    """Lines of the table: registers a thread on sm_80 / sm_90, by kernel and type."""
    rows: dict[str, dict[str, str]] = {}
    for kernel in sorted({kernel for kernel, _ in figures}):
        row, number = row_of(kernel)
        text = " / ".join(str(figures[kernel, target].registers) for target in TARGETS)
        rows.setdefault(row, {}).update(dict.fromkeys([number] if number else WIDE, text))
    lines = [f"| kernel | {' | '.join(WIDE)} |", "|---|---|---|---|"]
    for row, cells in rows.items():
        lines.append(f"| {row} | {' | '.join(cells.get(number, '—') for number in WIDE)} |")
    return lines


@pytest.fixture(scope="module")
def figures():
    if toolchain.find_cuda() is None or (reason := build.available(ARCHS)):
        pytest.skip(reason if toolchain.find_cuda() else toolchain.no_cuda())
    built = build.ensure(ARCHS, quiet=True)
    return parse((built.path.parent / "build.log").read_text("utf-8"))


def test_every_kernel_is_there_for_every_architecture(figures):
    wanted = set(itertools.product(expected_kernels(), TARGETS))
    assert figures.keys() == wanted


def test_nothing_spills_and_enough_warps_fit(figures):
    for (kernel, target), figure in figures.items():
        assert figure.spilled == 0, (kernel, target)
        assert figure.registers <= most_registers(kernel), (kernel, target)


def test_the_committed_table_is_that_of_the_sources(figures):
    text = README.read_text("utf-8")
    for line in table(figures)[2:]:
        name = line.split(" | ")[0]
        committed = [kept for kept in text.splitlines() if kept.startswith(f"{name} |")]
        assert len(committed) == 1, f"{name}: run python {Path(__file__).name}"
        both = (map(int, re.findall(r"\d+(?= [/|])", kept)) for kept in (committed[0], line))
        for old, new in zip(*both, strict=True):
            assert abs(old - new) <= MARGIN, f"{name}: run python {Path(__file__).name}"


def test_parser():
    log = """
ptxas info    : Compiling entry function '_ZN7fastcnn4cuda1613bn_act_kernelI13__nv_bfloat16Li8E\
Lb1EEEvNS1_12ActArgumentsIT_EENS0_4WalkE' for 'sm_80'
ptxas info    : Function properties for _ZN7fastcnn
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 72 registers, used 0 barriers, 504 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN1616bn_act_pool_backward_kernelI6__halfLi4ELi3E\
LNS0_4PassE2EEEvNS1_E' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers
"""
    log += """
ptxas info    : Compiling entry function '_ZN7fastcnn4cuda41_GLOBAL__N__992_9_update_cu_ead5082e13\
update_kernelI6__halfNS1_8AdamRuleEEEvNS1_11UpdateTableET0_' for 'sm_80'
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 68 registers
"""
    log += """
ptxas info    : Compiling entry function '_ZN7fastcnn4cuda46_GLOBAL__N__a5_14_conv_bn_act_cu_5e18\
conv_bn_act_kernelI13__nv_bfloat16Li64ELNS0_4TapsE2EEEvNS1_13ConvArgumentsIT_EE' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 127 registers
"""
    assert parse(log) == {
        ("conv_bn_act_kernel<bf16, 64, 2>", "sm_90"): Figures(127, 0),
        ("update_kernel<f16, adam>", "sm_80"): Figures(68, 4),
        ("bn_act_kernel<bf16, 8, 1>", "sm_80"): Figures(72, 16),
        ("bn_act_pool_backward_kernel<f16, 4, 3, 2>", "sm_90"): Figures(80, 0),
    }


def write_table() -> None:
    built = build.ensure(ARCHS)
    lines = table(parse((built.path.parent / "build.log").read_text("utf-8")))
    text = README.read_text("utf-8")
    start, end = "<!-- ptxas table -->\n", "<!-- end of ptxas table -->"
    head, rest = text.split(start)
    tail = rest.split(end)[1]
    README.write_text(head + start + "\n".join(lines) + "\n" + end + tail, "utf-8")


if __name__ == "__main__":
    write_table()
