"""The device that a measurement runs on: how fast it copies and multiplies, and how much of its memory was used."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

GPU_MILLISECONDS = 100
CPU_SECONDS = 0.2


class DeviceError(RuntimeError):
    """There is no such device here; the message says what was asked for."""


@dataclass(frozen=True)
class Rates:
    """What a device was seen to do at most.

    Attributes:
        device: its name.
        copy: bytes a second, read and written ones counted, of one large copy.
        matmul: operations a second of one large bfloat16 matmul, see `matmul_rate`; a multiply-add is two.
    """

    device: str
    copy: float
    matmul: float


def device_of(word: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` means here.

    Raises:
        DeviceError: there is no GPU.
    """
    if word == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device=cuda: PyTorch finds no GPU here")
    return torch.device("cuda" if word != "cpu" and torch.cuda.is_available() else "cpu")


def name_of(device: torch.device) -> str:
    """Return the device's name for a table; of a CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def measure_rates(device: torch.device) -> Rates:
    """Measure how fast a device copies and multiplies at most."""
    return Rates(name_of(device), copy_rate(device), matmul_rate(device))


def copy_rate(device: torch.device) -> float:
    """Measure bytes a second, read and written ones counted, of a copy too large for any cache."""
    size = 1 << (29 if device.type == "cuda" else 26)
    source, target = torch.zeros(2, size, dtype=torch.bfloat16, device=device)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure operations a second of a matmul that keeps all units busy; a multiply-add is two.

    It is the best of the layouts that a linear layer and its gradients have. They are not alike everywhere: on a CPU
    that has no bfloat16 one was seen to take six times as long as another.
    """
    side = 8192 if device.type == "cuda" else 512
    one, other = torch.randn(2, side, side, dtype=dtype, device=device)
    product = torch.empty_like(one)
    layouts = ((one, other), (one, other.T), (one.T, other))
    return max(2 * side**3 / seconds(partial(torch.mm, *pair, out=product), device) for pair in layouts)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Measure the median time of one call. On a GPU that of a captured CUDA graph: the host's part is left out."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(run, rep=GPU_MILLISECONDS, return_mode="median") / 1e3
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=CPU_SECONDS).median


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that PyTorch had allocated on the GPU, or this process had resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here on; on a CPU where Linux cannot, it goes on counting from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
