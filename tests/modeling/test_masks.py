"""Attention without a mask computes what it does under one, and is taken only where it may be."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from melt_serve.modeling import looplm
from melt_serve.modeling.masks import WHOLE, additive_mask, attention, bias_without_numbers, lower_right, spans_of
from tests.tiny_models import tiny_looplm, tokens

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def parts(queries: int, keys: int, groups: int, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(queries + keys)
    shapes = (4, queries), (4 // groups, keys), (4 // groups, keys)
    return [torch.randn(batch, *shape, 8, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(q: Tensor, k: Tensor, v: Tensor, visible: object, members: Tensor | None = None) -> list[Tensor]:
    """Return the answers of the members, and the gradients of a function of them."""
    out = attention(q, k, v, visible).transpose(1, 2)
    out = out if members is None else out[members]
    return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (4, 4), (4, 5), (4, 16), (5, 21)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_tokens_of_a_sequence_see_all_up_to_themselves(queries, keys, groups):
    qkv = parts(queries, keys, groups)
    places = torch.arange(keys)
    visible = (places[None] <= places[keys - queries :, None])[None]
    expected = with_gradients(*qkv, additive_mask(visible, torch.float64))
    with FlopCounterMode(display=False):  # as benches do
        of_a_gpu, of_a_cpu = bias_without_numbers(queries, keys), lower_right(queries, keys, qkv[0])
    for given in (visible, of_a_gpu, of_a_cpu):
        torch.testing.assert_close(with_gradients(*qkv, given), expected, **EXACT)


REAL = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1, 0], [1] * 10, [0] * 10, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()
STARTS = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 8, 0], [0] * 4 + [4] * 6, [0] * 10, [0] * 4 + [4] + [0] * 5])


@pytest.mark.parametrize("groups", [1, 2])
def test_documents_of_packs_see_themselves_alone(groups):
    qkv = parts(10, 10, groups, batch=4)
    columns = torch.arange(10)
    visible = (columns[None] <= columns[:, None]) & (columns >= STARTS[:, :, None]) & REAL[:, None]
    visible |= ~REAL[:, :, None]
    spans = spans_of(REAL, STARTS)
    assert spans is not None and len(spans) == 3 + 2 + 0 + 2
    expected = with_gradients(*qkv, visible, REAL)
    torch.testing.assert_close(with_gradients(*qkv, spans, REAL), expected, **EXACT)


def test_only_tokens_that_follow_each_other_need_no_mask():
    whole = torch.ones(2, 6, dtype=torch.bool)
    left, right, hole = whole.clone(), whole.clone(), whole.clone()
    left[0, :2], right[0, 4:], hole[1, 3] = False, False, False
    assert spans_of(whole, None) == spans_of(right, None) == WHOLE
    assert spans_of(left, None) is spans_of(hole, None) is None
    starts = torch.zeros(2, 6, dtype=torch.long)
    assert spans_of(right, starts) == WHOLE and spans_of(hole, starts) is None
    starts[1, 3:] = 3
    assert spans_of(hole, starts) is None, "a document that begins with padding"


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_a_looplm_answers_as_under_a_mask(packed, monkeypatch):
    model, ids = tiny_looplm().double(), tokens(4, 10)
    real = REAL if packed else torch.arange(10) < torch.tensor([[10], [3], [1], [7]])
    words = {"attention_mask": real, "output_loops": True} | ({"document_starts": STARTS} if packed else {})
    found, masked = [], looplm.spans_of(real, STARTS if packed else None)
    assert masked is not None
    given = model(ids, **words).loop_logits[:, real]
    monkeypatch.setattr(looplm, "spans_of", lambda *arguments: found.append(arguments))
    torch.testing.assert_close(given, model(ids, **words).loop_logits[:, real], **EXACT)
    assert len(found) == 1
