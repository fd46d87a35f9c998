"""The chunk grid holds under load: budgets, crowds, preemption, seeds."""

import pytest

from melt_serve.engine import turns
from melt_serve.engine.scheduler import tokens_in_step
from melt_serve.engine.turns import PATIENCE
from tests.engine.engines import RIGHT, distance, everything, generate, on, prompts, scheduler_of
from tests.engine.scenes import confined, counted

MODES = on("token", "chunk")


def test_a_prompt_chunk_runs_whole_or_not_at_all():
    assert tokens_in_step(start=0, wanted=100, prompt_length=100, chunk_size=32) == 32
    assert tokens_in_step(start=32, wanted=31, prompt_length=100, chunk_size=32) == 0
    assert tokens_in_step(start=96, wanted=4, prompt_length=100, chunk_size=32) == 4
    assert tokens_in_step(start=96, wanted=3, prompt_length=100, chunk_size=32) == 0


def test_a_generated_token_is_a_chunk_of_its_own_also_in_replay():
    assert tokens_in_step(start=100, wanted=1, prompt_length=100, chunk_size=32) == 1
    assert tokens_in_step(start=100, wanted=40, prompt_length=100, chunk_size=32) == 1
    assert tokens_in_step(start=100, wanted=0, prompt_length=100, chunk_size=32) == 0


def test_in_chunk_mode_a_step_stops_anywhere_but_does_not_cross_a_cut():
    assert tokens_in_step(start=0, wanted=100, prompt_length=100, chunk_size=32, decode_mode="chunk") == 32
    assert tokens_in_step(start=32, wanted=31, prompt_length=100, chunk_size=32, decode_mode="chunk") == 31
    assert tokens_in_step(start=60, wanted=40, prompt_length=50, chunk_size=32, decode_mode="chunk") == 4
    assert tokens_in_step(start=64, wanted=0, prompt_length=50, chunk_size=32, decode_mode="chunk") == 0
    assert tokens_in_step(start=64, wanted=32, prompt_length=50, chunk_size=32, decode_mode="chunk", drafted=True) == 31
    assert tokens_in_step(start=65, wanted=32, prompt_length=50, chunk_size=32, decode_mode="chunk", drafted=True) == 31


@MODES
@pytest.mark.parametrize("budget", [32, 39])
def test_endless_answers_do_not_starve_a_prompt_under_the_smallest_budget(served, budget, monkeypatch):
    """Three requests answer without end; with a budget of one chunk, a prompt of three chunks must get through."""
    llm, model = served
    live, endless, (prompt,) = llm.llm_engine, prompts(3, 4, 5), prompts(70)

    def steps_to_first_token():
        for number, begin in enumerate(endless):
            live.add_request(str(number), {"prompt_token_ids": begin}, everything(max_tokens=400, logprobs=None))
        for _ in range(10):
            live.step()
        live.add_request("prompt", {"prompt_token_ids": prompt}, everything(max_tokens=3))
        answered = None
        for step in range(390):
            for output in live.step():
                if output.request_id == "prompt":
                    answered = step if answered is None else answered
                    assert not output.finished or distance(model, [prompt], output.outputs) <= RIGHT
        while live.has_unfinished_requests():
            live.step()
        return answered

    with confined(scheduler_of(llm), budget):
        assert steps_to_first_token() <= 3 * (PATIENCE + 1) + 3
        if model.config.decode_mode == "token" and budget < 35:
            assert llm.reset_prefix_cache()
            monkeypatch.setattr(turns, "PATIENCE", 10_000)
            assert steps_to_first_token() is None, "without patience's end, the prompt waits for all answers"


@MODES
def test_seeded_requests_over_several_chunks_repeat_themselves(served):
    llm, batch = served.llm, prompts(10, 100, 150)
    sampling = {"temperature": 1.0, "max_tokens": 20}
    first, second = (generate(llm, batch, seed=7, **sampling) for _ in range(2))
    other = generate(llm, batch, seed=8, **sampling)
    (alone,) = generate(llm, batch[1:2], seed=7, **sampling)
    assert [output.token_ids for output in first] == [output.token_ids for output in second]
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert alone.token_ids == first[1].token_ids


@MODES
def test_seeded_requests_survive_preemption_with_the_same_tokens(served):
    llm, batch = served.llm, prompts(40, 40, 70, 33)
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 60, "logprobs": 1}
    plenty = generate(llm, batch, **sampling)
    assert llm.reset_prefix_cache()
    with confined(scheduler_of(llm), blocks=8), counted(scheduler_of(llm)) as counts:  # 5 final, 3 of open rows
        scarce = generate(llm, batch, **sampling)
    assert counts["preempted"] > 0
    assert [output.token_ids for output in scarce] == [output.token_ids for output in plenty]
