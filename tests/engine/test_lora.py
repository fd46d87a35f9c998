"""LoRA adapters in PEFT's format, on every linear layer: the engine equals the reference with the adapter merged in."""

import pytest

from tests.engine.adapters import (
    EVERY_LAYER,
    THE_GATE,
    answer_with,
    distance_with,
    distance_with_two,
    save_adapter,
)
from tests.engine.engines import ADAPTERS, RIGHT, distance, engine, generate, on, prompts, save_looplm

MODES = on("token, adapters", "chunk, adapters")


@MODES
@pytest.mark.parametrize("targets", [EVERY_LAYER + THE_GATE, THE_GATE], ids=["all", "gate"])
def test_an_adapter_equals_the_reference_with_it_merged_in(served, tmp_path, targets):
    assert distance_with_two(*served, tmp_path, targets) <= RIGHT


@MODES
def test_adapters_stay_with_their_requests_when_others_leave_the_step(served, tmp_path):
    """Run requests of other depths and other adapters side by side."""
    llm, model = served
    first, second = (save_adapter(tmp_path, model, EVERY_LAYER + THE_GATE, seed) for seed in range(2))
    asked, adapters = prompts(5, 70, 33, 40, 64), (first, None, second, first, None)
    depths = {"loops": (1, 4, 8, 3, 8), "exits": (1.0, 1.0, 0.8, 0.6, 0.9)}
    for _ in range(2):
        outputs = answer_with(llm, asked, adapters, **depths)
        assert distance_with(adapters, model, asked, outputs, **depths) <= RIGHT


def test_on_a_looplm_too(tmp_path):
    model = save_looplm(tmp_path / "model")
    with engine(tmp_path / "model", **ADAPTERS) as llm:
        assert distance_with_two(llm, model, tmp_path, EVERY_LAYER) <= RIGHT


@on("token, adapters")
def test_an_adapter_of_something_else_is_refused_and_the_engine_lives_on(served, tmp_path):
    llm, model = served
    other, asked = save_adapter(tmp_path, model, ("lm_head",)), prompts(40)
    with pytest.raises(ValueError, match="lm_head"):
        llm.llm_engine.add_lora(other.request)
    assert distance(model, asked, generate(llm, asked)) <= RIGHT
