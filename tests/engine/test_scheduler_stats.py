"""What the scheduler counts for `/metrics`, on engines where the right numbers can be worked out by hand."""

from dataclasses import asdict

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from melt_serve.engine.scheduler_stats import StepCounts
from tests.engine.engines import engine, generate, on, prompts, save_melt, scheduler_of
from tests.engine.scenes import confined


@pytest.fixture
def steps(monkeypatch):
    """Collect the counts of every step of every engine in this process."""
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


@on("token")
def test_a_prompt_is_cut_at_its_chunks(served, steps):
    generate(served.llm, prompts(70), max_tokens=8)
    assert total(steps, "pieces") == 3 + 7  # 32 + 32 + 6 tokens; the last of them gives the first of eight
    assert total(steps, "cuts") == 2 and total(steps, "deferred") == 0
    assert {name: total(steps, name) for name in ("lost_hit_tokens", "replays", "replayed_tokens")} == {
        "lost_hit_tokens": 0,
        "replays": 0,
        "replayed_tokens": 0,
    }


@on("token")
def test_a_piece_waits_where_the_budget_ends_inside_its_chunk(served, steps):
    with confined(scheduler_of(served.llm), budget=40):
        generate(served.llm, prompts(32, 32), max_tokens=1)
    assert total(steps, "pieces") == 2 and total(steps, "deferred") >= 1 and total(steps, "cuts") == 0


@on("token", "token, chunks of 64", "token, chunks of 96")
def test_hits_are_lost_behind_the_last_place_where_one_may_end(served, steps):
    llm, model = served
    first, other = prompts(140, 50)
    generate(llm, [first], max_tokens=1)
    assert total(steps, "lost_hit_tokens") == 0
    for same, lost in ((97, {32: 0, 64: 32, 96: 0}), (80, {32: 0, 64: 0, 96: 64})):
        steps.clear()
        generate(llm, [first[:same] + other], max_tokens=1)
        assert total(steps, "lost_hit_tokens") == lost[model.config.chunk_size]


@on("token", "chunk")
def test_rows_are_those_of_running_requests_by_what_they_are(served, steps):
    generate(served.llm, prompts(70), loops=3, max_tokens=8)
    assert most(steps, "final_blocks") == 3 and most(steps, "looplm_blocks") == 9
    # The last chunk's, of loops 1 and 2.
    assert most(steps, "open_blocks") == (2 if served.model.config.decode_mode == "chunk" else 0)
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
