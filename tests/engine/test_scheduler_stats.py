"""What the scheduler counts for `/metrics`, on engines where the right numbers can be worked out by hand."""

from dataclasses import asdict

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from melt_serve.engine.scheduler_stats import StepCounts
from tests.engine.engines import engine, generate, prompts, save_melt


@pytest.fixture
def steps(monkeypatch):
    """The counts of every step of every engine in this process."""
    seen: list[StepCounts] = []
    monkeypatch.setattr(StepCounts, "put", lambda counts, stats: seen.append(counts))
    return seen


def total(steps, name):
    return sum(getattr(step, name) for step in steps)


def most(steps, name):
    return max(getattr(step, name) for step in steps)


def test_counts_travel_among_vllms_numbers_and_leave_them_as_they_were():
    stats, counts = SchedulerStats(num_kv_fetch_reqs_by_stage={"waiting": 2}), StepCounts(pieces=3, open_blocks=5)
    counts.put(stats)
    assert StepCounts.take(stats) == counts
    assert stats.num_kv_fetch_reqs_by_stage == {"waiting": 2}
    assert StepCounts.take(stats) is None


def test_a_prompt_is_cut_at_its_chunks(tmp_path, steps):
    save_melt(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=512) as llm:
        generate(llm, prompts(70), max_tokens=8)
    assert total(steps, "pieces") == 3 + 7  # 32 + 32 + 6 tokens; the last of them gives the first of eight
    assert total(steps, "cuts") == 2 and total(steps, "deferred") == 0
    assert {name: total(steps, name) for name in ("lost_hit_tokens", "replays", "replayed_tokens")} == {
        "lost_hit_tokens": 0,
        "replays": 0,
        "replayed_tokens": 0,
    }


def test_a_piece_waits_where_the_budget_ends_inside_its_chunk(tmp_path, steps):
    save_melt(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=40) as llm:
        generate(llm, prompts(32, 32), max_tokens=1)
    assert total(steps, "pieces") == 2 and total(steps, "deferred") >= 1 and total(steps, "cuts") == 0


@pytest.mark.parametrize(("chunk_size", "lost"), [(32, 0), (64, 32), (128, 96)])
def test_hits_are_lost_behind_the_last_place_where_one_may_end(tmp_path, steps, chunk_size, lost):
    save_melt(tmp_path, chunk_size=chunk_size)
    first, other = prompts(140, 50)
    with engine(tmp_path, block_size=32) as llm:
        generate(llm, [first], max_tokens=1)
        assert total(steps, "lost_hit_tokens") == 0
        generate(llm, [first[:97] + other], max_tokens=1)
    assert total(steps, "lost_hit_tokens") == lost


@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_rows_are_those_of_running_requests_by_what_they_are(tmp_path, steps, mode):
    save_melt(tmp_path, decode_mode=mode)
    depth = {"extra_args": {"loops": 3}}
    with engine(tmp_path, block_size=32, max_model_len=256) as llm:
        generate(llm, prompts(70), max_tokens=8, **depth)
    assert most(steps, "final_blocks") == 3 and most(steps, "looplm_blocks") == 9
    assert most(steps, "open_blocks") == (2 if mode == "chunk" else 0)  # the last chunk's, of loops 1 and 2
    assert (steps[-1].final_blocks, steps[-1].open_blocks, steps[-1].looplm_blocks) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_preempted_requests_run_again_what_they_had_run(tmp_path, steps, mode):
    save_melt(tmp_path, decode_mode=mode, max_loops=4)
    scarce = {"block_size": 32, "num_gpu_blocks_override": 9, "max_model_len": 160, "enable_prefix_caching": False}
    with engine(tmp_path, **scarce) as llm:
        generate(llm, prompts(40, 40, 70, 33), max_tokens=60)
        preemptions = sum(each.value for each in llm.get_metrics() if each.name == "vllm:num_preemptions")
    assert total(steps, "replays") == preemptions > 0
    assert total(steps, "replayed_tokens") >= 33 * preemptions
    assert all(count >= 0 for step in steps for count in asdict(step).values())
