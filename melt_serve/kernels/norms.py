"""Sandwich norms in one pass over memory: the norm that closes a block, the residual sum, and the norm that opens the
next block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from melt_serve.kernels.dispatch import jit, takes_triton, tl, triton

WIDEST = 16384
"""The largest hidden size that one program holds."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Norms = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def reference(x: Tensor, residual: Tensor, closing: Tensor, opening: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute norm_add_norm in plain PyTorch; nothing is overwritten."""
    total = residual.float() + normalize(x.float(), closing, epsilon).float()
    return normalize(total, opening, epsilon), total.to(x.dtype)


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm of float32 x; it is rounded before and after the multiplication, as vLLM's norms are."""
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(weight.dtype) * weight


def norm_add_norm(
    x: Tensor, residual: Tensor, closing: Tensor, opening: Tensor, epsilon: float, otherwise: Norms = reference
) -> tuple[Tensor, Tensor]:
    """Compute s = residual + norm(x; closing), and return norm(s; opening) and s, both [tokens, hidden].

    The Triton version writes them over x and residual. It takes tensors of one dtype (float16, bfloat16, float32) whose
    last dimension is contiguous, and computes in float32. Nothing in it waits for the device, and its launch depends on
    shapes alone. `torch.compile` fuses norms by itself: there `otherwise` runs, unless `MELT_KERNELS=triton`.

    Args:
        x: [tokens, hidden], what a block has computed.
        residual: [tokens, hidden], the residual stream before it.
        closing, opening: [hidden], the weights of the two norms.
        epsilon: of both.
        otherwise: what runs where Triton does not; it may overwrite x and residual, too.

    Raises:
        KernelError: `MELT_KERNELS=triton` for tensors that it does not take.
    """
    if not takes_triton("norm_add_norm", x.device, lambda: refusal(x, residual, closing, opening)):
        return otherwise(x, residual, closing, opening, epsilon)
    if x.numel():
        with torch.cuda.device_of(x):
            kernel[(x.shape[0],)](
                x,
                residual,
                closing,
                opening,
                x.shape[1],
                x.stride(0),
                residual.stride(0),
                epsilon,
                BLOCK_SIZE=triton.next_power_of_2(x.shape[1]),
            )
    return x, residual


def refusal(x: Tensor, residual: Tensor, closing: Tensor, opening: Tensor) -> str | None:
    """Return why the Triton version does not take these tensors; None if it does."""
    tensors = (x, residual, closing, opening)
    if len({tensor.dtype for tensor in tensors}) > 1 or x.dtype not in DTYPES:
        return f"its tensors are {', '.join(str(tensor.dtype) for tensor in tensors)}, not of one float dtype"
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        return f"of its tensors, one has a last dimension that is not contiguous: {[each.stride() for each in tensors]}"
    if x.shape[-1] > WIDEST:
        return f"its hidden size {x.shape[-1]} is above {WIDEST}"
    return None


@jit
def kernel(x, residual, closing, opening, hidden, x_stride, residual_stride, epsilon, BLOCK_SIZE: tl.constexpr):
    """Compute one token, over x and residual."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_SIZE)
    inside = columns < hidden
    here, there = x + token * x_stride + columns, residual + token * residual_stride + columns
    block = tl.load(here, mask=inside, other=0).to(tl.float32)
    total = tl.load(there, mask=inside, other=0).to(tl.float32)
    total += normalized(block, closing, columns, inside, hidden, epsilon)
    tl.store(there, total, mask=inside)
    tl.store(here, normalized(total, opening, columns, inside, hidden, epsilon), mask=inside)


@jit
def normalized(values, weight, columns, inside, hidden, epsilon):
    """Compute the RMS norm of a row in float32, rounded where `normalize` rounds."""
    scale = 1 / tl.sqrt(tl.sum(values * values, axis=0) / hidden + epsilon)
    rounded = (values * scale).to(weight.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0)
    return (rounded * weights.to(tl.float32)).to(weights.dtype).to(tl.float32)
