"""Shapes and tolerances that several test files share; threads and GPU."""

import fcntl
import logging
import math
import os
import signal
from pathlib import Path

import pytest
import torch

# (N, K, P, Q): one channel, odd sizes, channel counts on and off every vector width, single pixels
SHAPES = [
    (2, 1, 3, 5),
    (3, 3, 4, 4),
    (2, 17, 5, 3),
    (2, 65, 3, 3),
    (4, 3, 1, 1),
    (1, 3, 7, 2),
    (2, 24, 6, 5),
    (1, 32, 8, 8),
    (3, 100, 5, 3),
    (2, 512, 4, 2),
    (1, 64, 9, 7),
]
# few enough values for a numerical Jacobian
SMALL_SHAPES = [shape for shape in SHAPES if math.prod(shape) <= 300]
# apex#1768: a channels-last Welford was wrong here
LARGE_SHAPE = (2, 65, 100, 100)

# one network of each structure, for what the others would only repeat
STRUCTURES = ["cnn-a", "tiny-b", "murgolo-improved", "mao-batchnorm", "vgg11", "resnet18"]

# what is compiled with or without a GPU
CUDA_ARCHS = "8.0;9.0+PTX"

# pool: window, stride, padding
POOLS = [(2, 2, 0), (3, 2, 0), (3, 2, 1)]

# GRADCHECK: its defaults let an error of 1e-4 pass
GRADCHECK = {"atol": 1e-7, "rtol": 1e-7}
# absolute and relative, between two orders of the same arithmetic
TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
}


@pytest.fixture(scope="session", autouse=True)
def _heard_signals():
    # a job in the background is started with these ignored, and would hand that on to the
    # processes whose Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    # the user's cache would make a second run of the tests another one than the first; a script
    # that has built the library just now hands its own over
    given = os.environ.get("FASTCNN_TEST_CACHE")
    folder = given or str(_of_all_workers(tmp_path_factory) / "cache")
    os.environ["FASTCNN_CACHE"] = folder
    # a test that has a cache of its own has it for images: in all tests a process chooses its
    # convolutions as those do that it starts, whose bits may be compared with its own
    from fastcnn.ops import conv_autotune

    conv_autotune.cache_dir = lambda: Path(folder)


def _of_all_workers(tmp_path_factory):
    """A folder that xdist's workers share: what is compiled there is compiled once."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _simt_module(tmp_path_factory, name, flags):
    """The CUDA kernels compiled for the CPU (tests/simt), a file; by the first worker to ask."""
    from simt import harness

    folder = _of_all_workers(tmp_path_factory) / name
    folder.mkdir(exist_ok=True)
    note = folder / "path"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not note.exists():
            note.write_text(str(harness.compile_module(folder, flags)))
    return Path(note.read_text())


@pytest.fixture(scope="session")
def library(request):
    """The native library, built once a session; with --full or a GPU its CUDA kernels too, wherever
    there is an nvcc."""
    from fastcnn import ops
    from fastcnn.ops.native import build, toolchain

    handed_over = "FASTCNN_TEST_CACHE" in os.environ
    wanted = request.config.getoption("--full") or torch.cuda.is_available()
    if wanted and torch.version.cuda and toolchain.find_cuda() and not handed_over:
        build.ensure(CUDA_ARCHS)  # what ops.load() then finds
    return ops.load()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The CUDA kernels compiled for the CPU (tests/simt), a file."""
    return _simt_module(tmp_path_factory, "simt", ["-O2"])


@pytest.fixture(scope="session")
def kernels(compiled):
    """Their launchers, a module."""
    from simt import harness

    return harness.load_module(compiled)


@pytest.fixture
def chain(kernels):
    """The launchers on torch tensors, in fenced memory."""
    from simt.chain import Chain

    yield Chain(kernels)
    kernels.descending(False)
    kernels.only_blocks(0, -1)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The same with the address and undefined-behaviour sanitizers, a file."""
    from simt import harness

    # the compiler takes longer than the program, above -O0
    return _simt_module(tmp_path_factory, "sanitized", harness.SANITIZE)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache that nothing was packed into yet."""
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """Where a test writes its image folder."""
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def _process_settings():
    # before: a module's fixtures may have trained; after: the next module's are to find them so
    reset_process()
    yield
    reset_process()


def reset_process():
    """Undo what a command or a run sets for its process, which is the next test's too.

    Results on the CPU are bit-equal only at a fixed number of threads.
    """
    from fastcnn.ops import conv_autotune

    for name in ("CUBLAS_WORKSPACE_CONFIG", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    conv_autotune.set_mode("auto")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False  # an error after an import that froze these settings
    logger = logging.getLogger("fastcnn")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    torch.manual_seed(0)


@pytest.fixture
def torchs_convolutions():
    """Convolutions are torch's: their rounding is not what is tested, nor may a timing choose."""
    from fastcnn.ops import conv_autotune

    conv_autotune.set_mode("vendor")
    yield
    conv_autotune.set_mode("auto")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests that take long")


def pytest_collection_modifyitems(config, items):
    # a test that is named on the command line runs, however long it takes
    full = config.getoption("--full") or any("::" in argument for argument in config.args)
    for item in items:
        # not by keyword: parameters are keywords too
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("full") and not full:
            item.add_marker(pytest.mark.skip(reason="takes long: --full runs it"))
