"""The element-wise part of the KV gate, between the gate's matmuls and the K and V projections."""

import torch
from torch import Tensor


def gate_blend(logits: Tensor, h: Tensor, n: Tensor) -> Tensor:
    """h_t = z * h_{t-1} + (1 - z) * n_t with z = sigmoid(logits) (arXiv 2605.07721; modeling/README.md).

    Args:
        logits: [tokens, hidden] or [tokens, 1], W_z n + U_z h + b_z.
        h: [tokens, hidden], the state of the loop before.
        n: [tokens, hidden], the normed attention input.

    Returns:
        [tokens, hidden], in the dtype of n.
    """
    return torch.lerp(n, h, torch.sigmoid(logits).expand_as(n))
