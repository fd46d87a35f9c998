"""The chunk grid holds under load: budgets, crowds, preemption, seeds."""

import pytest

from melt_serve.engine.scheduler import tokens_in_step
from tests.engine.engines import distance, engine, generate, prompts, save_melt

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


@pytest.mark.parametrize("budget", [32, 50, 512])
def test_output_does_not_depend_on_token_budget_or_neighbours(tmp_path, budget):
    model = save_melt(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=budget, max_num_seqs=6) as llm:
        crowded = generate(llm, prompts(*LENGTHS))
        alone = [generate(llm, [prompt])[0] for prompt in prompts(*LENGTHS)]
    for prompt, together, single in zip(prompts(*LENGTHS), crowded, alone, strict=True):
        assert together.token_ids == single.token_ids
        assert distance(model, prompt, together, loops=4) <= 1e-4
        assert distance(model, prompt, single, loops=4) <= 1e-4


def test_a_preempted_request_is_replayed_to_the_same_rows(tmp_path):
    model = save_melt(tmp_path)
    batch = prompts(40, 40, 70, 33)
    with engine(tmp_path, block_size=32, num_gpu_blocks_override=9, max_model_len=160) as llm:
        outputs = generate(llm, batch, max_tokens=60)
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0
    for prompt, output in zip(batch, outputs, strict=True):
        assert distance(model, prompt, output, loops=4) <= 1e-4


def test_seeded_requests_over_several_chunks_repeat_themselves(tmp_path):
    save_melt(tmp_path)
    batch = prompts(10, 100, 150)
    with engine(tmp_path) as llm:
        first, second = (generate(llm, batch, temperature=1.0, seed=7, max_tokens=20) for _ in range(2))
        other = generate(llm, batch, temperature=1.0, seed=8, max_tokens=20)
        (alone,) = generate(llm, batch[1:2], temperature=1.0, seed=7, max_tokens=20)
    assert [output.token_ids for output in first] == [output.token_ids for output in second]
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert alone.token_ids == first[1].token_ids


def test_seeded_requests_survive_preemption_with_the_same_tokens(tmp_path):
    save_melt(tmp_path)
    batch = prompts(40, 40, 70, 33)
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 60, "logprobs": 1}
    with engine(tmp_path, block_size=32, num_gpu_blocks_override=9, max_model_len=160) as llm:
        scarce = generate(llm, batch, **sampling)
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0
    with engine(tmp_path, max_model_len=160) as llm:
        plenty = generate(llm, batch, **sampling)
    assert [output.token_ids for output in scarce] == [output.token_ids for output in plenty]
