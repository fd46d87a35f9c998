"""Who sees whom in attention: masks, and the two cases that need none, which flash kernels compute.

Letters as in `looplm.py`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

QUERIES_AT_ONCE = 1024
"""Under a mask, so that nothing attention needs for a while grows with the square of a sequence."""

Spans = list[tuple[slice, slice]]
"""Rows of a batch and columns of them: in a span a token sees all up to itself, and nothing of other spans."""


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | Spans) -> Tensor:
    """Compute softmax(q k / sqrt(D)) v over what each query may look at.

    Args:
        q: [B, H, S, D]. k, v: [B, KV heads, K, D].
        visible: [B, S, K], true where a query may look, or an `additive_mask`; or `lower_right`; or spans, outside of
            which the answer is 0.

    Returns:
        [B, H, S, D].
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(visible, CausalBias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    if isinstance(visible, Tensor):
        parts = zip(q.split(QUERIES_AT_ONCE, dim=2), visible[:, None].split(QUERIES_AT_ONCE, dim=2), strict=True)
        outs = [F.scaled_dot_product_attention(part, k, v, attn_mask=m, enable_gqa=grouped) for part, m in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    if visible == WHOLE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    out = torch.zeros_like(q)
    for rows, columns in visible:
        here = (rows, slice(None), columns)
        out[here] = F.scaled_dot_product_attention(q[here], k[here], v[here], is_causal=True, enable_gqa=grouped)
    return out


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into what is added to the scores: 0 where a query may look, minus infinity elsewhere.

    Attention makes one of every boolean mask and keeps it for the backward pass; made once, it is kept once.
    """
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def lower_right(queries: int, keys: int, like: Tensor) -> Tensor | Spans:
    """Return what lets the last tokens of a sequence see all of it up to themselves.

    Args:
        queries, keys: how many these are, and the whole sequence.
        like: has their dtype and device. On a GPU the answer is no mask but a kind that its flash kernels know.
    """
    if queries == keys:
        return WHOLE
    if like.is_cuda:
        return bias_without_numbers(queries, keys)
    seen = torch.ones(1, queries, keys, dtype=torch.bool, device=like.device)
    return additive_mask(seen.tril_(keys - queries), like.dtype)


def bias_without_numbers(queries: int, keys: int) -> Tensor:
    """Make PyTorch's name for the same, which it cannot make while operations are counted."""
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


WHOLE: Spans = [(slice(None), slice(None))]


def spans_of(real: Tensor, document_starts: Tensor | None) -> Spans | None:
    """Return the documents of a batch, each with the padding after it; None where padding stands before tokens.

    Args:
        real: [B, S], true for tokens.
        document_starts: [B, S], the column where each token's document begins; None where a row is one document.
    """
    columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
    starts = torch.zeros_like(columns) if document_starts is None else document_starts
    begins = real & (columns == starts)
    follows = F.pad(real[:, :-1] & (starts[:, 1:] == starts[:, :-1]), (1, 0))
    if (real & ~begins & ~follows).any():
        return None
    found = begins.nonzero().tolist()
    if all(column == 0 for _, column in found):
        return WHOLE
    ends = [(row, real.shape[1]) for row in range(len(real))]
    places = sorted([*found, *map(list, ends)])
    return [
        (slice(row, row + 1), slice(column, end))
        for (row, column), (row_of_end, end) in pairwise(places)
        if row == row_of_end
    ]
