"""The chunk grid holds under load: budgets, crowds, preemption, seeds."""

import pytest

from melt_serve.engine import turns
from melt_serve.engine.scheduler import tokens_in_step
from melt_serve.engine.turns import PATIENCE
from tests.engine.engines import distance, engine, everything, generate, prompts, save_melt

MODES = pytest.mark.parametrize("mode", ["token", "chunk"])
LENGTHS = (5, 31, 32, 33, 64, 90, 128, 150)


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


@MODES
@pytest.mark.parametrize("budget", [32, 39])
def test_endless_answers_do_not_starve_a_prompt_under_the_smallest_budget(tmp_path, mode, budget, monkeypatch):
    """Three requests answer without end; with a budget of one chunk, a prompt of three chunks must get through."""
    model = save_melt(tmp_path, decode_mode=mode)
    endless, prompt = prompts(3, 4, 5), prompts(70)[0]

    def steps_to_first_token(llm):
        live = llm.llm_engine
        for number, begin in enumerate(endless):
            live.add_request(str(number), {"prompt_token_ids": begin}, everything(max_tokens=400))
        for _ in range(10):
            live.step()
        live.add_request("prompt", {"prompt_token_ids": prompt}, everything(max_tokens=3))
        answered = None
        for step in range(390):
            for output in live.step():
                if output.request_id == "prompt":
                    answered = step if answered is None else answered
                    assert not output.finished or distance(model, prompt, output.outputs[0], loops=4) <= 1e-4
        while live.has_unfinished_requests():
            live.step()
        return answered

    with engine(tmp_path, max_num_batched_tokens=budget, max_num_seqs=8, enable_prefix_caching=False) as llm:
        assert steps_to_first_token(llm) <= 3 * (PATIENCE + 1) + 3
        if mode == "token" and budget < 35:
            monkeypatch.setattr(turns, "PATIENCE", 10_000)
            assert steps_to_first_token(llm) is None, "without patience's end, the prompt waits for all answers"


@MODES
def test_seeded_requests_over_several_chunks_repeat_themselves(tmp_path, mode):
    save_melt(tmp_path, decode_mode=mode)
    batch = prompts(10, 100, 150)
    with engine(tmp_path) as llm:
        first, second = (generate(llm, batch, temperature=1.0, seed=7, max_tokens=20) for _ in range(2))
        other = generate(llm, batch, temperature=1.0, seed=8, max_tokens=20)
        (alone,) = generate(llm, batch[1:2], temperature=1.0, seed=7, max_tokens=20)
    assert [output.token_ids for output in first] == [output.token_ids for output in second]
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert alone.token_ids == first[1].token_ids


@MODES
def test_seeded_requests_survive_preemption_with_the_same_tokens(tmp_path, mode):
    save_melt(tmp_path, decode_mode=mode, max_loops=4)  # 9 blocks: 5 of final rows, 3 of open ones, 1 null
    batch = prompts(40, 40, 70, 33)
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 60, "logprobs": 1}
    with engine(tmp_path, block_size=32, num_gpu_blocks_override=9, max_model_len=160) as llm:
        scarce = generate(llm, batch, **sampling)
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0
    with engine(tmp_path, max_model_len=160) as llm:
        plenty = generate(llm, batch, **sampling)
    assert [output.token_ids for output in scarce] == [output.token_ids for output in plenty]
