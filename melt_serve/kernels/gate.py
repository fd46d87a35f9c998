"""The KV gate between its matmuls and the K and V projections: sum, sigmoid and blend in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from melt_serve.kernels.dispatch import jit, takes_triton, tl, triton

BLOCK = 1024
WIDEST_SCALAR = 16384
"""The largest hidden size whose gradient one program sums, where a token has one gate value."""


def gate_blend(
    from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor, out: Tensor | None = None
) -> Tensor:
    """Compute h_t = z * h_{t-1} + (1 - z) * n_t, where z = sigmoid(W_z n_t + U_z h_{t-1} + b_z).

    Source: arXiv 2605.07721; modeling/README.md, section 2. The Triton version takes tensors of one dtype (float16,
    bfloat16, float32, float64) whose last dimension is contiguous; others go to the reference (see `takes_triton`). It
    computes in float32, of float64 in float64, and has a gradient. Nothing in it waits for the device, and its launch
    depends on shapes alone.

    Args:
        from_input: [..., hidden], W_z n_t; or [..., 1], one gate value a token.
        from_state: the same of U_z h_{t-1}.
        bias: [hidden] or [1], b_z.
        h: [..., hidden], the state of the loop before.
        n: [..., hidden], the normed attention input.
        out: where to write it, [..., hidden], without gradients; may be h, which is then overwritten.

    Returns:
        [..., hidden], or `out`.

    Raises:
        KernelError: `MELT_KERNELS=triton` for tensors that it does not take.
    """
    if not takes_triton("gate_blend", n.device, lambda: refusal(from_input, from_state, bias, h, n, out)):
        return reference(from_input, from_state, bias, h, n, out)
    inputs: tuple[Tensor, ...] = (*flat(from_input, from_state), bias, *flat(h, n))
    if out is None:
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if differentiated or torch.compiler.is_compiling():
            return torch.ops.melt_serve.gate_blend(*inputs).view(n.shape)
        out = torch.empty_like(n, memory_format=torch.contiguous_format)
    launch(inputs, out.view(-1, out.shape[-1]))
    return out


def reference(
    from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor, out: Tensor | None = None
) -> Tensor:
    """Blend in plain PyTorch; inside a compiled graph the compiler fuses it."""
    return torch.lerp(n, h, torch.sigmoid(from_input + from_state + bias).expand_as(n), out=out)


def refusal(
    from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor, out: Tensor | None
) -> str | None:
    """Return why the Triton version does not take these tensors; None if it does."""
    tensors = [from_input, from_state, bias, h, n] + ([] if out is None else [out])
    if len({tensor.dtype for tensor in tensors}) > 1 or not n.dtype.is_floating_point or n.dtype.itemsize < 2:
        return f"its tensors are {', '.join(str(tensor.dtype) for tensor in tensors)}, not of one float dtype"
    if out is not None and out.ndim > 2 and not out.is_contiguous():
        return f"its output has the strides {out.stride()}"
    if any(tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in tensors):
        return f"of its tensors, one has a last dimension that is not contiguous: {[each.stride() for each in tensors]}"
    if from_input.shape[-1] == 1 and n.shape[-1] > WIDEST_SCALAR:
        return f"its hidden size {n.shape[-1]} is above {WIDEST_SCALAR}"
    return None


def flat(*tensors: Tensor) -> list[Tensor]:
    """Flatten each tensor to [tokens, columns]."""
    return [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]


@torch.library.custom_op("melt_serve::gate_blend", mutates_args=())
def blend(from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor) -> Tensor:
    """Blend [tokens, hidden] as one operator of PyTorch's, which its compiler does not look into."""
    out = torch.empty_like(n, memory_format=torch.contiguous_format)
    launch((from_input, from_state, bias, h, n), out)
    return out


@blend.register_fake
def _(from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor) -> Tensor:
    return torch.empty_like(n, memory_format=torch.contiguous_format)


@torch.library.custom_op("melt_serve::gate_blend_backward", mutates_args=())
def blend_backward(
    gradient: Tensor, from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the sigmoid's argument, of h and of n, from a recomputed z: cheaper than to keep it."""
    of_logits = torch.empty_like(from_input, memory_format=torch.contiguous_format)
    of_h, of_n = torch.empty_like(gradient), torch.empty_like(gradient)
    if n.numel():
        scalar = from_input.shape[1] == 1 and n.shape[1] > 1
        block = triton.next_power_of_2(n.shape[1])
        block = block if scalar else min(BLOCK, block)
        with torch.cuda.device_of(n):
            backward_kernel[(n.shape[0], triton.cdiv(n.shape[1], block))](
                gradient,
                from_input,
                from_state,
                bias,
                h,
                n,
                of_logits,
                of_h,
                of_n,
                n.shape[1],
                from_input.stride(0),
                from_state.stride(0),
                h.stride(0),
                n.stride(0),
                SCALAR=scalar,
                WIDE=tl.float64 if n.dtype == torch.float64 else tl.float32,
                BLOCK_SIZE=block,
            )
    return of_logits, of_h, of_n


@blend_backward.register_fake
def _(
    gradient: Tensor, from_input: Tensor, from_state: Tensor, bias: Tensor, h: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty_like(gradient)
    return torch.empty_like(from_input, memory_format=torch.contiguous_format), empty, torch.empty_like(empty)


def keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Save what the gradient needs."""
    ctx.save_for_backward(*inputs)


def differentiate(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs; those of W_z n and U_z h are the same."""
    of_logits, of_h, of_n = torch.ops.melt_serve.gate_blend_backward(gradient.contiguous(), *ctx.saved_tensors)
    return of_logits, of_logits, of_logits.sum(0), of_h, of_n


blend.register_autograd(differentiate, setup_context=keep_inputs)


def launch(inputs: tuple[Tensor, ...], out: Tensor) -> None:
    """Run the kernel on [tokens, hidden]."""
    from_input, from_state, bias, h, n = inputs
    if not n.numel():
        return
    block = min(BLOCK, triton.next_power_of_2(n.shape[1]))
    with torch.cuda.device_of(n):
        forward_kernel[(n.shape[0], triton.cdiv(n.shape[1], block))](
            from_input,
            from_state,
            bias,
            h,
            n,
            out,
            n.shape[1],
            from_input.stride(0),
            from_state.stride(0),
            h.stride(0),
            n.stride(0),
            out.stride(0),
            SCALAR=from_input.shape[1] == 1 and n.shape[1] > 1,
            WIDE=tl.float64 if n.dtype == torch.float64 else tl.float32,
            BLOCK_SIZE=block,
        )


@jit
def forward_kernel(
    from_input,
    from_state,
    bias,
    h,
    n,
    out,
    hidden,
    input_stride,
    state_stride,
    h_stride,
    n_stride,
    out_stride,
    SCALAR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Blend BLOCK_SIZE columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = columns < hidden
    z = gate_of(
        from_input + token * input_stride, from_state + token * state_stride, bias, columns, inside, SCALAR, WIDE
    )
    old = tl.load(h + token * h_stride + columns, mask=inside).to(WIDE)
    new = tl.load(n + token * n_stride + columns, mask=inside).to(WIDE)
    tl.store(out + token * out_stride + columns, z * old + (1 - z) * new, mask=inside)


@jit
def backward_kernel(
    gradient,
    from_input,
    from_state,
    bias,
    h,
    n,
    of_logits,
    of_h,
    of_n,
    hidden,
    input_stride,
    state_stride,
    h_stride,
    n_stride,
    SCALAR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Differentiate BLOCK_SIZE columns of one token, all of them where it has one gate value.

    The gradients are contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = columns < hidden
    z = gate_of(
        from_input + token * input_stride, from_state + token * state_stride, bias, columns, inside, SCALAR, WIDE
    )
    old = tl.load(h + token * h_stride + columns, mask=inside, other=0).to(WIDE)
    new = tl.load(n + token * n_stride + columns, mask=inside, other=0).to(WIDE)
    above = tl.load(gradient + token * hidden + columns, mask=inside, other=0).to(WIDE)
    tl.store(of_h + token * hidden + columns, above * z, mask=inside)
    tl.store(of_n + token * hidden + columns, above * (1 - z), mask=inside)
    of_z = above * (old - new) * z * (1 - z)
    if SCALAR:
        tl.store(of_logits + token, tl.sum(of_z, axis=0))
    else:
        tl.store(of_logits + token * hidden + columns, of_z, mask=inside)


@jit
def gate_of(from_input, from_state, bias, columns, inside, SCALAR: tl.constexpr, WIDE: tl.constexpr):
    """Compute z of a token: for some of its columns or, where SCALAR, for all of them."""
    if SCALAR:
        logits = tl.load(from_input).to(WIDE) + tl.load(from_state).to(WIDE) + tl.load(bias).to(WIDE)
    else:
        logits = tl.load(from_input + columns, mask=inside, other=0).to(WIDE)
        logits += tl.load(from_state + columns, mask=inside, other=0).to(WIDE)
        logits += tl.load(bias + columns, mask=inside, other=0).to(WIDE)
    return 1 / (1 + tl.exp(-logits))
