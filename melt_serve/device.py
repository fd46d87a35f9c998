"""What a device can do at most: how fast it copies and multiplies; and a clock for what is held against that."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.benchmark import Timer

from melt_serve.bench.engine import BenchError

GPU_MILLISECONDS = 100
CPU_SECONDS = 0.2


@dataclass(frozen=True)
class Rates:
    """Measured on one device.

    Attributes:
        device: its name.
        copy: bytes a second, read and written ones counted, of one large copy.
        matmul: operations a second of one large bfloat16 matmul, see `matmul_rate`; a multiply-add is two.
    """

    device: str
    copy: float
    matmul: float


def name_of(device: torch.device) -> str:
    """How the device is called in a table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of one call. On a GPU that of a captured CUDA graph: what the host does is left out."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(run, rep=GPU_MILLISECONDS, return_mode="median") / 1e3
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=CPU_SECONDS).median


def measure_rates(device: torch.device) -> Rates:
    """What it can do at most."""
    return Rates(name_of(device), copy_rate(device), matmul_rate(device))


def copy_rate(device: torch.device) -> float:
    """Of a copy too large for any cache."""
    size = 1 << (29 if device.type == "cuda" else 26)
    source, target = torch.zeros(2, size, dtype=torch.bfloat16, device=device)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of a matmul that keeps all units busy, in the best of the layouts that a linear layer and its gradients have.

    They are not alike everywhere: on a CPU that has no bfloat16 one was seen to take six times as long as another.
    """
    side = 8192 if device.type == "cuda" else 512
    one, other = torch.randn(2, side, side, dtype=dtype, device=device)
    product = torch.empty_like(one)
    layouts = ((one, other), (one, other.T), (one.T, other))
    return max(2 * side**3 / seconds(partial(torch.mm, *pair, out=product), device) for pair in layouts)


def device_of(word: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here.

    Raises:
        BenchError: there is no GPU.
    """
    if word == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device=cuda: PyTorch finds no GPU here")
    return torch.device("cuda" if word != "cpu" and torch.cuda.is_available() else "cpu")
