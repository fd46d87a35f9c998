"""A gate is cut to the nearest one of its rank, and nothing else is touched."""

import pytest
import torch

from melt_serve.train.distil.gate_rank import cut_gate, nearest_factors
from tests.tiny_models import tiny_melt, tokens


def test_the_full_rank_changes_nothing():
    melt, ids = tiny_melt().double(), tokens(2, 13)
    cut = cut_gate(melt, melt.config.hidden_size)
    torch.testing.assert_close(cut(ids).logits, melt(ids).logits, atol=1e-8, rtol=0)


@pytest.mark.parametrize("rank", [1, 5])
def test_the_answers_are_those_of_the_gate_with_its_product_written_out(rank):
    melt, ids = tiny_melt().double(), tokens(2, 13)
    before, cut = melt(ids).logits, cut_gate(melt, rank)
    with torch.no_grad():
        for layer in melt.model.layers:
            for name in ("input_proj", "state_proj"):
                weight = getattr(layer.self_attn.kv_gate, name).weight
                left, values, right = torch.linalg.svd(weight)
                values[rank:] = 0
                weight.copy_(left @ values.diag() @ right)
    torch.testing.assert_close(cut(ids).logits, melt(ids).logits, atol=1e-8, rtol=0)
    assert (cut(ids).logits - before).abs().max() > 1e-3


def test_what_is_missed_is_the_smaller_singular_values():
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    up, down = nearest_factors(weight, 7)
    assert (up.shape, down.shape) == ((24, 7), (7, 24))
    torch.testing.assert_close((up @ down - weight).square().sum(), torch.linalg.svdvals(weight)[7:].square().sum())
