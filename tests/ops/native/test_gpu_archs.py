"""Architectures: read, compared, turned into flags, held against GPUs."""

import pytest

from fastcnn.errors import UsageError
from fastcnn.ops.native.build import check_gpu_code
from fastcnn.ops.native.gpu_archs import gencode_flags, includes, parse_archs, present_capabilities


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("9.0+PTX, 8.0", ("8.0", "9.0+PTX")),
        (" 10.0 8.6 8.6 ", ("8.6", "10.0")),
        ("9.0;9.0+PTX", ("9.0+PTX",)),
        ("none", ()),
    ],
)
def test_read_in_any_notation(text, expected):
    assert parse_archs(text, "--archs") == expected


@pytest.mark.parametrize("text", ["", "8", "sm_80", "8.0;none", "9.0+ptx", "8.0;;x"])
def test_a_word_that_is_none_is_an_error(text):
    with pytest.raises(UsageError, match=r"--archs: '.*' is no architecture"):
        parse_archs(text, "--archs")


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), ("8.0",), True),
        ((8, 9), ("8.0",), True),
        ((8, 0), ("8.6",), False),
        ((9, 0), ("8.0",), False),
        ((9, 0), ("8.0+PTX",), True),
        ((12, 0), ("8.0", "9.0+PTX"), True),
        ((7, 5), ("8.0", "9.0+PTX"), False),
        ((8, 6), ("8.9+PTX",), False),
        ((10, 0), ("9.0",), False),
        ((9, 0), (), False),
    ],
)
def test_code_runs_on_later_gpus_of_its_major_number_and_ptx_on_all_later_ones(
    capability, archs, runs
):
    reason = check_gpu_code(capability, archs)
    assert (reason == "") == runs
    if reason:
        assert f"compute capability {capability[0]}.{capability[1]}" in reason
        assert all(arch in reason for arch in archs)
        assert "`fastcnn build --archs" in reason


def test_ptx_adds_to_an_architecture():
    assert includes(("8.0", "9.0+PTX"), ("9.0",))
    assert not includes(("9.0",), ("9.0+PTX",))
    assert includes((), ())


def test_flags_of_nvcc():
    assert gencode_flags(("8.0", "9.0+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_gpus_present(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: [(9, 0), (8, 0), (9, 0)][i])
    assert present_capabilities() == [(8, 0), (9, 0)]
    monkeypatch.setattr("torch.version.cuda", None)
    assert present_capabilities() == []
