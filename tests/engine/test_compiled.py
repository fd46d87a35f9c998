"""Engines that torch.compile has compiled equal the reference like those that run eagerly."""

import pytest

from tests.engine.adapters import EVERY_LAYER, THE_GATE, distance_with_two
from tests.engine.engines import (
    ADAPTERS,
    AROUND_CUTS,
    RIGHT,
    distance,
    distance_at_mixed_depths,
    engine,
    generate,
    prompts,
    save_looplm,
    save_melt,
)
from tests.engine.test_depth import builder_of


@pytest.mark.parametrize(("mode", "bias"), [("token", "shared"), ("chunk", "loop")])
def test_one_depth_and_mixed_depths_equal_the_reference(tmp_path, monkeypatch, mode, bias):
    """All later loops are one graph, also where each has a bias of its own, and where attention bridges gaps."""
    model = save_melt(tmp_path, num_hidden_layers=1, decode_mode=mode, kv_gate_bias=bias)
    asked = prompts(*AROUND_CUTS)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert distance(model, asked, generate(llm, asked, loops=3), loops=3) <= RIGHT
        assert distance_at_mixed_depths(llm, model) <= RIGHT
        monkeypatch.setattr(builder_of(llm), "bridges_gaps", True)
        asked = prompts(203)
        assert distance(model, asked, generate(llm, asked, 8, 0.85, max_tokens=1), 8, 0.85) <= RIGHT


def test_a_looplm_equals_the_reference(tmp_path):
    model, asked = save_looplm(tmp_path, num_hidden_layers=1, max_loops=8), prompts(*AROUND_CUTS)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert distance(model, asked, generate(llm, asked)) <= RIGHT
        assert distance_at_mixed_depths(llm, model) <= RIGHT


def test_adapters_equal_the_reference_with_them_merged_in(tmp_path):
    model = save_melt(tmp_path / "model", num_hidden_layers=1)
    with engine(tmp_path / "model", enforce_eager=False, **ADAPTERS) as llm:
        assert distance_with_two(llm, model, tmp_path, EVERY_LAYER + THE_GATE) <= RIGHT
