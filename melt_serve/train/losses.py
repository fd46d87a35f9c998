"""The losses of post-training (arXiv 2605.07721; README.md). Letters as in `melt_serve.modeling`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_over_loops(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy in nats, mean over loops and tokens, as Ouro is trained.

    Args:
        logits: [T, tokens, V].
        targets: [T, tokens].
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def distillation(teacher_logits: Tensor, student_logits: Tensor, tokens: int | None = None) -> Tensor:
    """L_KD: KL(teacher_t || student_t) in nats, mean over loops and tokens, at temperature 1 (our choice).

    Args:
        teacher_logits, student_logits: [T, tokens, V].
        tokens: that the mean is over, where these are only some of them.
    """
    loops, given, _ = student_logits.shape
    teacher = F.log_softmax(teacher_logits.float(), dim=-1).flatten(0, 1)
    student = F.log_softmax(student_logits.float(), dim=-1).flatten(0, 1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence / (loops * (given if tokens is None else tokens))


def squared_distance(teacher_output: Tensor, student_output: Tensor, members: Tensor) -> Tensor:
    """|| o_MELT - o_LoopLM ||^2 of one layer at one loop, summed over d and over the member tokens.

    Args:
        teacher_output, student_output: [B, Q, d], attention outputs after W_O, before the sandwich norm.
        members: [B, Q], true where there is a token.
    """
    wide = torch.promote_types(student_output.dtype, torch.float32)
    distance = (student_output.to(wide) - teacher_output.detach().to(wide)).square().sum(-1)
    return distance.masked_fill(~members, 0.0).sum()
