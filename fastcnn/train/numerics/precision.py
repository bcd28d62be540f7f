"""Which device a run takes, and which number format its arithmetic has there."""

from dataclasses import dataclass

import torch

from fastcnn.errors import UsageError
from fastcnn.ops.native.gpu_archs import archs_of_torch, name_of, runs_on

NO_BF16 = "--amp: this CPU has no bf16 instructions; training runs in fp32"
NO_FP16 = NO_BF16.replace("bf16", "fp16")


@dataclass(frozen=True)
class Precision:
    """`dtype`: of activations and of the weights' copies, None for fp32 alone. `note` explains a
    refusal of AMP."""

    dtype: torch.dtype | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """fp32, bf16 or fp16."""
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names[self.dtype]

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow without a scaled loss; bf16 has fp32's range."""
        return self.dtype is torch.float16


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device that exists; raise UsageError otherwise.

    cuda:N becomes torch's current GPU: events and streams that name none are on that one.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_torch_code(device)
        return device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: '{name}' is not one of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: '{name}' is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no GPU here; use --device cpu, or see `fastcnn doctor`"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs")
    check_torch_code(device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_torch_code(device: torch.device) -> None:
    """Raise UsageError for a GPU that torch holds no code for: its first operation would fail."""
    archs = archs_of_torch(torch.cuda.get_arch_list()) if device.type == "cuda" else ()
    if not archs:  # torch tells nothing
        return
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, archs):
        raise UsageError(
            f"--device {device}: torch {torch.__version__} holds CUDA code for "
            f"{', '.join(archs)}, which this GPU (compute capability {name_of(capability)}) cannot "
            "run; install a torch built for it, or use --device cpu"
        )


def choose_precision(device: torch.device, amp: bool, amp_dtype: str) -> Precision:
    """bf16 or fp16 where the hardware computes in it, fp32 (with a note) where it would emulate.

    amp_dtype: as the option. "auto" is bf16: what it is in training, `amp.decided` has replaced it
    with.
    """
    if not amp or amp_dtype == "fp32":
        return Precision()
    dtype = torch.float16 if amp_dtype == "fp16" else torch.bfloat16
    if device.type == "cpu" and not cpu_computes_in(dtype):
        return Precision(note=NO_BF16 if dtype is torch.bfloat16 else NO_FP16)
    if device.type == "cuda" and dtype is torch.bfloat16 and not gpu_computes_in_bf16(device):
        note = "--amp: this GPU computes bf16 only by emulation; training runs in fp16"
        return Precision(torch.float16, note)
    return Precision(dtype)


def gpu_computes_in_bf16(device: torch.device) -> bool:
    """Whether this GPU has bf16 matrix instructions: Ampere (sm_80) and newer."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in `dtype` (AVX-512 BF16 or AMX; AMX FP16)."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()
