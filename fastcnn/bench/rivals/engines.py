"""The rivals of inference on a CPU: engines that run the exported network.

onnxruntime and OpenVINO get the same ONNX model, as `fastcnn export` writes it: norms folded, fp32.
They know the size of the batch beforehand, take as many threads as torch and compute in fp32;
OpenVINO would take bf16 where the CPU has it. Images are read where they lie. An engine's threads
do not spin beyond a pass, in which the others would meet them.
"""

from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from fastcnn.archs.fold import fold
from fastcnn.archs.plain import plain
from fastcnn.errors import FastcnnError
from fastcnn.packages import PackageError, require

PACKAGES = {  # the first is the engine itself
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}

Pass = Callable[[Tensor], Tensor]


def why_not(engine: str, device: torch.device, half: torch.dtype | None) -> str:
    """Return why an engine cannot be measured on this device beside networks in `half` (None:
    fp32); "" if it can."""
    if device.type != "cpu":
        return "it is a rival on the CPU; use --device cpu"
    if half is not None:
        return "it computes in fp32; leave --amp out"
    try:
        require(*PACKAGES[engine])
    except PackageError as error:
        state = str(error).partition(";")[0]
        return f"{state}; pip install {' '.join(PACKAGES[engine])}"
    return ""


def versions_of(engines: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the engines by name."""
    return {engine: version(engine) for engine in engines}


def onnx_of(model: nn.Module, size: int) -> bytes:
    """Return a network for evaluation, on images of this side, as an ONNX model."""
    # here, as below: training steps from a bare source tree need no package that export needs
    from fastcnn.export import onnx_file
    from fastcnn.export.network import Exported

    return onnx_file.encode(Exported(plain(fold(model)), None, size).eval(), {})


def start(engine: str, model: bytes, shape: tuple[int, ...], classes: int) -> Pass:
    """Return an ONNX model as a function of images, run by this engine.

    Images: fp32 of `shape` (N, 3, H, W), contiguous, on the CPU. Logits: (N, classes), overwritten
    by the next pass. Raises FastcnnError where the engine takes another number of threads.
    """
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[engine](model, shape, classes)


def _onnxruntime(model: bytes, shape: tuple[int, ...], classes: int) -> Pass:
    from fastcnn.export import onnx_file
    from fastcnn.export.network import BATCH, INPUT, OUTPUT

    options = onnx_file.session_options()
    options.add_free_dimension_override_by_name(BATCH, shape[0])
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnx_file.session(model, options)
    logits = torch.empty(shape[0], classes)
    binding = session.io_binding()
    binding.bind_output(OUTPUT, "cpu", 0, np.float32, tuple(logits.shape), logits.data_ptr())

    def run(images: Tensor) -> Tensor:
        binding.bind_input(INPUT, "cpu", 0, np.float32, shape, images.data_ptr())
        session.run_with_iobinding(binding)
        return logits

    return run


def _openvino(model: bytes, shape: tuple[int, ...], classes: int) -> Pass:
    import openvino

    threads = torch.get_num_threads()
    core = openvino.Core()
    network = core.read_model(model)
    network.reshape(list(shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": True,
        "NUM_STREAMS": 1,
    }
    compiled = core.compile_model(network, "CPU", settings)
    if (taken := compiled.get_property("INFERENCE_NUM_THREADS")) != threads:
        raise FastcnnError(f"OpenVINO takes {taken} threads, torch {threads}; give --threads")
    request = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return run
