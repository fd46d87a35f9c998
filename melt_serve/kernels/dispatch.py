"""Which version of a kernel runs: Triton's on a GPU, the PyTorch reference elsewhere, or as `MELT_KERNELS` says."""

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:  # not every PyTorch brings it
    triton = tl = None


INTERPRETED = bool(triton and triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, as `TRITON_INTERPRET=1` said when this was imported."""
Kernels = Literal["auto", "triton", "reference"]
WORDS = get_args(Kernels)
VARIABLE = "MELT_KERNELS"


class KernelError(ValueError):
    """`MELT_KERNELS` is no known word, or asks for a version that cannot run; the message says why."""


def chosen() -> Kernels:
    """Read `MELT_KERNELS`, by default `auto`: Triton for tensors on a GPU, the reference for all others.

    A graph of `torch.compile` keeps what was chosen when it was made.

    Raises:
        KernelError: its value is none of `auto`, `triton` and `reference`.
    """
    word = os.environ.get(VARIABLE, "auto")
    if word not in WORDS:
        raise KernelError(f"{VARIABLE}={word!r} is none of {', '.join(WORDS)}")
    return cast(Kernels, word)


def takes_triton(kernel: str, device: torch.device, refuse: Callable[[], str | None] = lambda: None) -> bool:
    """Decide whether the Triton version of `kernel` runs on tensors of this device.

    Under `auto`, a warning says once why it does not run on a GPU, and a graph of `torch.compile` gets the formula: its
    compiler fuses it with what stands beside it, and launches no kernel from Python.

    Args:
        refuse: called where Triton could run; returns why the kernel does not take these tensors, None if it does.

    Raises:
        KernelError: `MELT_KERNELS=triton`, and it cannot run.
    """
    choice = chosen()
    if choice == "reference" or (choice == "auto" and (device.type != "cuda" or torch.compiler.is_compiling())):
        return False
    if triton is None:
        refusal: str | None = "Triton is not installed"
    elif device.type != "cuda" and not INTERPRETED:
        refusal = f"its tensors are on {device}; there only Triton's interpreter runs (TRITON_INTERPRET=1)"
    else:
        refusal = refuse()
    if refusal is None:
        return True
    if choice == "triton":
        raise KernelError(f"{VARIABLE}=triton cannot run {kernel}: {refusal}")
    warnings.warn(f"{kernel} does not run in Triton: {refusal}", stacklevel=3)
    return False


def jit(kernel: Callable) -> Any:
    """Compile a kernel with Triton, where Triton is installed."""
    return kernel if triton is None else triton.jit(kernel)
