"""The losses of post-training (arXiv 2605.07721; README.md). Letters as in `melt_serve.modeling`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from melt_serve.train.stages import Distance

ANSWERS_AT_ONCE = 1024
"""Answers, of one token at one loop each, whose logits exist together in `distillation_from_states`."""
SMALLEST_SQUARE = 1e-6
"""Added to what a relative distance is divided by: an output of nothing has no scale."""


def cross_entropy_over_loops(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute next-token cross-entropy in nats, mean over loops and tokens, as Ouro is trained.

    Args:
        logits: [T, tokens, V].
        targets: [T, tokens].
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def distillation(teacher_logits: Tensor, student_logits: Tensor, tokens: int | None = None) -> Tensor:
    """Compute L_KD = KL(teacher_t || student_t) in nats, mean over loops and tokens, at temperature 1 (our choice).

    Tests compare `distillation_from_states` with it.

    Args:
        teacher_logits, student_logits: [T, tokens, V].
        tokens: how many the mean is over, where these are only some of them.
    """
    loops, given, _ = student_logits.shape
    return divergence(teacher_logits, student_logits) / (loops * (given if tokens is None else tokens))


def divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Compute KL(teacher || student) in nats, summed over all dimensions: [..., V] each."""
    return divergence_by_word(teacher_logits, student_logits).sum()


def divergence_by_word(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Compute what each word of the vocabulary adds to KL(teacher || student) in nats: [..., V] each."""
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    teacher, student = (F.log_softmax(logits, dim=-1, dtype=wide) for logits in (teacher_logits, student_logits))
    return F.kl_div(student, teacher, reduction="none", log_target=True)


def distillation_from_states(
    teacher_states: Tensor,
    teacher_head: Tensor,
    student_states: Tensor,
    student_head: Tensor,
    tokens: int | None = None,
) -> Tensor:
    """Compute `distillation` of the logits that the heads make of the states, ANSWERS_AT_ONCE at a time.

    Args:
        teacher_states, student_states: [T, tokens, d].
        teacher_head, student_head: [V, d].
        tokens: how many the mean is over, where these are only some of them.
    """
    return distillation_by_loop(teacher_states, teacher_head, student_states, student_head, tokens)[0]


def distillation_by_loop(
    teacher_states: Tensor,
    teacher_head: Tensor,
    student_states: Tensor,
    student_head: Tensor,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `distillation_from_states`, and each loop's share of it, [T], whose mean it is, without a gradient."""
    loops, given, _ = student_states.shape
    states, teacher_states = student_states.flatten(0, 1), teacher_states.flatten(0, 1)
    total, each = SlicedDivergence.apply(states, student_head, teacher_states, teacher_head, ANSWERS_AT_ONCE)
    count = given if tokens is None else tokens
    return total / (loops * count), each.view(loops, given).sum(-1) / count


class SlicedDivergence(torch.autograd.Function):
    """`divergence`, slice by slice; each slice's gradient is taken at once, so that no logits wait for the backward."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, teacher_states: Tensor, teacher_head: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Sum the divergence over all states, [answers, d], in slices of `size`; give each answer's, too, [answers]."""
        wide = torch.promote_types(head.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=states.device)
        each = torch.zeros(len(states), dtype=wide, device=states.device)
        of_states = torch.empty_like(states)
        of_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(states), size):
            here = slice(start, start + size)
            with torch.enable_grad():
                inputs = [states[here].detach().requires_grad_(), head.detach().requires_grad_(of_head is not None)]
                by_word = divergence_by_word(F.linear(teacher_states[here], teacher_head), F.linear(*inputs))
                slice_total = by_word.sum()
            each[here] = by_word.detach().sum(-1)
            total += slice_total.detach()
            if of_head is not None:
                of_states[here], of_slice = torch.autograd.grad(slice_total, inputs)
                of_head += of_slice
            elif ctx.needs_input_grad[0]:
                (of_states[here],) = torch.autograd.grad(slice_total, inputs[:1])
        ctx.save_for_backward(of_states, None if of_head is None else of_head.to(head.dtype))
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_total: Tensor) -> tuple[Tensor | None, ...]:
        """Return the student's gradients; the teacher gets none."""
        of_states, of_head = ctx.saved_tensors
        return of_total[0] * of_states, None if of_head is None else of_total[0] * of_head, None, None, None


def squared_distance(teacher_output: Tensor, student_output: Tensor, members: Tensor, distance: Distance) -> Tensor:
    """Compute || o_MELT - o_LoopLM ||^2 of one layer at one loop, summed over the member tokens.

    Args:
        teacher_output, student_output: [B, Q, d], attention outputs after W_O, before the sandwich norm.
        members: [B, Q], true where there is a token.
        distance: `relative` divides each token's square by || o_LoopLM ||^2 (our choice), `mean` by d.
    """
    wide = torch.promote_types(student_output.dtype, torch.float32)
    teacher = teacher_output.detach().to(wide)
    squares = (student_output.to(wide) - teacher).square().sum(-1)
    match distance:
        case "relative":
            squares = squares / (teacher.square().sum(-1) + SMALLEST_SQUARE)
        case "mean":
            squares = squares / teacher.shape[-1]
    return squares.masked_fill(~members, 0.0).sum()
