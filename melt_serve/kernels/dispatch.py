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
    """`MELT_KERNELS` asks for what there is not, or cannot run; the message says why."""


def chosen() -> Kernels:
    """`MELT_KERNELS`, by default `auto`: Triton for tensors on a GPU, the reference for all others.

    A graph of `torch.compile` keeps what was chosen when it was made.

    Raises:
        KernelError: it is none of the words it may be.
    """
    word = os.environ.get(VARIABLE, "auto")
    if word not in WORDS:
        raise KernelError(f"{VARIABLE}={word!r} is none of {', '.join(WORDS)}")
    return cast(Kernels, word)


def takes_triton(kernel: str, device: torch.device, refuse: Callable[[], str | None] = lambda: None) -> bool:
    """Whether the Triton version of `kernel` runs on tensors of this device.

    Where it does not on a GPU though nobody has said so, a warning tells why, once.

    Args:
        refuse: asked where Triton could run; what is the matter with these tensors, None if the kernel takes them.

    Raises:
        KernelError: `MELT_KERNELS=triton`, and it cannot be.
    """
    choice = chosen()
    if choice == "reference" or (choice == "auto" and device.type != "cuda"):
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
    """A Triton kernel, where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)
