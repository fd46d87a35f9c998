"""LoopLM (Ouro) checkpoints in the same engine: the baseline, and depth on weights that exist."""

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from melt_serve.api.metrics import capacity_tokens, row_bytes
from melt_serve.bundled import LOOPLM
from melt_serve.config import kv_bytes_per_token
from melt_serve.engine import looplm as looplm_module
from melt_serve.engine import looplm_scheduler
from melt_serve.engine.looplm_cache import LoopRowsManager
from melt_serve.task.evaluate import heldout
from melt_serve.task.tokenizer import prompt_ids
from tests.engine.engines import (
    CONTRASTS,
    DEPTHS,
    EXITS,
    RIGHT,
    WRONG,
    Served,
    distance,
    distance_at_mixed_depths,
    engine,
    generate,
    prompts,
    save_looplm,
    scheduler_of,
)
from tests.engine.engines import LENGTHS as MIXED
from tests.engine.random_scenes import FEW, judge, plays
from tests.engine.scenes import LIMITS, Server, blocks_of_longest, confined, counted, save_tokenizer
from tests.engine.test_depth import loops_run
from tests.engine.test_token_loops import judge_told

LENGTHS = (1, 2, 31, 64, 65, 203)


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_float32_equals_the_reference_at_every_depth_and_the_cache_grows_with_the_loops(tmp_path, loops):
    model, asked = save_looplm(tmp_path), prompts(*LENGTHS)
    with engine(tmp_path, hf_overrides={"total_ut_steps": loops}) as llm:
        assert distance(model, asked, generate(llm, asked), loops) <= RIGHT
        config = llm.llm_engine.vllm_config
        cache, room = config.cache_config, capacity_tokens(config) * row_bytes(config)
        rows = cache.num_gpu_blocks * cache.block_size
        assert cache.kv_cache_size_tokens <= rows // loops < cache.kv_cache_size_tokens + cache.block_size
    row = kv_bytes_per_token(model.config, bytes_per_value=4, loops=1)
    assert (32 << 20) // row - cache.block_size < rows <= (32 << 20) // row
    assert (32 << 20) - (loops + 1) * cache.block_size * row < room <= 32 << 20, "as /melt/info and /metrics say"


def test_small_budgets_a_warm_prefix_cache_and_seeds_keep_answers_as_they_are(tmp_path):
    model, asked = save_looplm(tmp_path, num_key_value_heads=4, tie_word_embeddings=True), prompts(*LENGTHS)
    with engine(tmp_path, max_num_batched_tokens=48, max_num_seqs=8, enable_prefix_caching=True, block_size=32) as llm:
        with counted(scheduler_of(llm)) as counts:
            for _ in range(2):
                assert distance(model, asked, generate(llm, asked)) <= RIGHT
        assert counts["hit"] >= 192
        drawn = []
        for seed in (7, 7, 8):
            assert llm.reset_prefix_cache()  # so that each is prefilled in several steps
            drawn.append(generate(llm, prompts(200), temperature=1.0, seed=seed)[0].token_ids)
    first, again, other = drawn
    assert first == again != other


@pytest.fixture(scope="class")
def looplm(tmp_path_factory):
    path = tmp_path_factory.mktemp("looplm")
    model = save_looplm(path, max_loops=8)
    save_tokenizer(path)
    with engine(path, **{**LIMITS, "max_num_seqs": 8, "max_num_batched_tokens": 160}) as llm:
        yield Served(llm, model)


class TestDepths:
    def test_mixed_in_a_batch_equal_the_reference_with_and_without_exits(self, looplm):
        assert distance_at_mixed_depths(*looplm) <= RIGHT

    def test_take_contrasts_and_tell_what_each_token_ran(self, looplm):
        llm, model = looplm
        asked = prompts(*MIXED)
        for exits in ((1.0,) * len(asked), EXITS):
            outputs = generate(llm, asked, DEPTHS, exits, CONTRASTS, told=True, max_tokens=12)
            assert distance(model, asked, outputs, DEPTHS, exits, CONTRASTS) <= RIGHT
            for each in zip(asked, outputs, DEPTHS, exits, strict=True):
                judge_told(model, *each)

    def test_nor_do_gaps_change_answers_where_attention_bridges_them_as_on_a_gpu(self, looplm, monkeypatch):
        llm, model = looplm
        layer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[0].self_attn.attn
        builder, bridged = layer.attn_backend.get_builder_cls(), []
        monkeypatch.setattr(builder, "bridges_gaps", True)
        attend = layer.impl.forward

        def noting(*args, **kwargs):
            bridged.append(getattr(args[5], "queries", None) is not None)
            return attend(*args, **kwargs)

        monkeypatch.setattr(layer.impl, "forward", noting)
        asked = prompts(203)
        assert distance(model, asked, generate(llm, asked, 8, 0.7, max_tokens=1), 8, 0.7) <= RIGHT
        assert any(bridged), "exits must scatter, or this shows nothing"

    def test_loops_that_are_not_run_are_not_paid(self, looplm):
        """Count the tokens that pass through a layer: as many as the loops of all tokens together."""
        llm, model = looplm
        asked, passed = prompts(*MIXED, seed=2), []
        layer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[0].mlp.down_proj
        hook = layer.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))
        try:
            assert llm.reset_prefix_cache()
            generate(llm, asked, DEPTHS, max_tokens=5)
            tokens = [len(prompt) + 5 - 1 for prompt in asked]
            assert sum(passed) == sum(own * loops for own, loops in zip(tokens, DEPTHS, strict=True))
            passed.clear()
            assert llm.reset_prefix_cache()
            outputs = generate(llm, asked, DEPTHS, EXITS, max_tokens=5)
        finally:
            hook.remove()
        ran = [loops_run(model, *each).tolist() for each in zip(asked, outputs, DEPTHS, EXITS, strict=True)]
        assert sum(passed) == sum(map(sum, ran))
        assert len({loops for each in ran for loops in each}) >= 6, "exits must come at many loops"

    def test_hold_rows_of_their_own_loops_only(self, looplm, monkeypatch):
        llm, model = looplm
        scheduler, asked = scheduler_of(llm), prompts(40, 33, 5, 64)
        pool, schedule, held = scheduler.kv_cache_manager.block_pool, scheduler.schedule, []

        def counting(*args):
            output = schedule(*args)
            held.append(scheduler._blocks_in_use())
            return output

        monkeypatch.setattr(scheduler, "schedule", counting)
        assert llm.reset_prefix_cache()
        for loops, blocks in ((1, 7), (3, 21), ([1, 2, 3, 8], 2 + 2 * 2 + 3 + 2 * 8)):  # of 32 tokens
            held.clear()
            outputs = generate(llm, asked, loops, max_tokens=1)
            assert distance(model, asked, outputs, loops) <= RIGHT
            assert max(held) == blocks
            assert llm.reset_prefix_cache()
        assert scheduler._blocks_in_use() == 0 and pool.get_num_free_blocks() == pool.num_gpu_blocks - 1

    def test_of_one_loop_fit_where_as_many_of_eight_do_not(self, looplm):
        llm, model = looplm
        asked = prompts(*[60] * 8, seed=7)
        scheduler = scheduler_of(llm)
        for loops, preempted in ((1, False), (8, True)):
            with confined(scheduler, blocks=blocks_of_longest(scheduler)), counted(scheduler) as counts:
                outputs = generate(llm, asked, loops, max_tokens=40)
            assert distance(model, asked, outputs, loops) <= RIGHT
            assert bool(counts["preempted"]) is preempted
            assert llm.reset_prefix_cache()

    def test_share_prefixes_with_deeper_requests_only(self, looplm, monkeypatch):
        llm, model = looplm
        asked = prompts(100, seed=3)
        steps = ((2, 1.0, 0), (4, 1.0, 0), (2, 1.0, 96), (4, 1.0, 96), (1, 1.0, 96), (8, 1.0, 0), (4, 1.0, 96))
        exits = ((4, 0.9, 0), (2, 0.9, 0), (4, 0.8, 0), (4, 0.9, 96), (4, 1.0, 96))
        for loops, threshold, found in (*steps, *exits):
            with counted(scheduler_of(llm)) as counts:
                outputs = generate(llm, asked, loops, threshold)
            assert distance(model, asked, outputs, loops, threshold) <= RIGHT
            assert counts["hit"] == found, (loops, threshold)
        assert llm.reset_prefix_cache()

        def of_any_loop(manager, *args, kv_cache_group_ids, **kwargs):
            (found,), tokens = FullAttentionManager.find_longest_cache_hit(*args, kv_cache_group_ids=[0], **kwargs)
            return ([block for block in found for _ in range(manager.loops_wanted)],), tokens

        monkeypatch.setattr(LoopRowsManager, "find_longest_cache_hit", of_any_loop)
        generate(llm, asked, loops=2)
        assert distance(model, asked, generate(llm, asked, loops=4), loops=4) > WRONG
        assert llm.reset_prefix_cache()

    def test_find_a_longer_prefix_where_they_run_fewer_loops(self, looplm):
        llm, model = looplm
        long, deep = prompts(190, seed=8), prompts(190, seed=8)
        deep[0] = deep[0][:70]
        assert llm.reset_prefix_cache()
        generate(llm, deep, loops=4, max_tokens=1)
        for loops, before, found in ((2, 64, 160), (4, 64, 160), (8, 0, 160)):
            for expected in (before, found):
                with counted(scheduler_of(llm)) as counts:
                    outputs = generate(llm, long, loops, max_tokens=1)
                assert distance(model, long, outputs, loops) <= RIGHT
                assert counts["hit"] == expected, loops

    def test_too_deep_for_the_room_leave_rows_cached_that_are_too_shallow_for_them(self, looplm):
        llm, _ = looplm
        live, (shared, other) = llm.llm_engine, prompts(100, 60, seed=9)
        assert llm.reset_prefix_cache()
        generate(llm, [shared], loops=2, max_tokens=1)
        deep = SamplingParams(max_tokens=3, extra_args={"loops": 8})
        with confined(scheduler_of(llm), blocks=2 * 8 + 3 * 8):  # of the other, and too few of this one
            live.add_request("other", TokensPrompt(prompt_token_ids=other), deep)
            live.add_request("shared", TokensPrompt(prompt_token_ids=shared), deep)
            live.step()
            running = [request.num_prompt_tokens for request in scheduler_of(llm).running]
            live.abort_request(["other", "shared"])
            with counted(scheduler_of(llm)) as counts:
                generate(llm, [shared], loops=2, max_tokens=1)
        assert running == [60] and counts["hit"] == 96

    def test_are_told_apart_in_events_of_the_cache(self, looplm, monkeypatch):
        manager = scheduler_of(looplm.llm).kv_cache_manager
        take, seen = manager.take_events, []

        def watched():
            events = take()
            seen.extend((each.group_idx, len(each.block_hashes), each.kv_cache_spec_kind) for each in events)
            return events

        assert looplm.llm.reset_prefix_cache()
        monkeypatch.setattr(manager, "take_events", watched)
        for pool in (manager, manager.block_pool):
            monkeypatch.setattr(pool, "enable_kv_cache_events", True)
        for stored in ({}, {"kv_cache_report_mode": "full"}):  # then hits are told, too
            generate(looplm.llm, prompts(70, seed=11), extra_args={"loops": 3, **stored}, max_tokens=1)
            assert seen == [(loop, 2, "full_attention") for loop in range(3)]
            seen.clear()

    def test_with_exits_are_part_of_a_prefix(self, looplm, monkeypatch):
        llm, model = looplm
        asked = prompts(100, seed=4)
        monkeypatch.setattr(looplm_scheduler, "salt_with_depth", lambda request, depth: None)
        generate(llm, asked, loops=8, exits=0.5)
        assert distance(model, asked, generate(llm, asked, loops=8), loops=8) > WRONG
        assert llm.reset_prefix_cache()

    def test_of_exits_need_copies_of_rows(self, looplm, monkeypatch):
        llm, model = looplm
        asked = prompts(40, seed=5)
        monkeypatch.setattr(looplm_module, "copies_of", lambda loop, plan, running: None)
        outputs = generate(llm, asked, loops=8, exits=0.7)
        assert distance(model, asked, outputs, loops=8, exits=0.7) > WRONG
        assert llm.reset_prefix_cache()

    @plays(FEW)
    def test_do_not_depend_on_load(self, looplm, scene):
        judge(Server(*looplm), scene)

    @pytest.mark.parametrize("asked", [{"loops": 0}, {"loops": 9}, {"loops": "2"}, {"loops": True}, {"loops": None}])
    def test_outside_the_range_are_refused(self, looplm, asked):
        with pytest.raises(VLLMValidationError, match="from 1 to 8"):
            generate(looplm.llm, prompts(5), extra_args=asked)

    def test_of_unknown_words_are_refused(self, looplm):
        with pytest.raises(VLLMValidationError, match="above 0 and at most 1"):
            generate(looplm.llm, prompts(5), extra_args={"exit_threshold": 7})
        with pytest.raises(VLLMValidationError, match="reasoning_effort must be one of none, minimal, low"):
            generate(looplm.llm, prompts(5), extra_args={"reasoning_effort": "hardest"})
        assert len(generate(looplm.llm, prompts(5))[0].token_ids) == 8


def test_pipeline_parallelism_is_refused(tmp_path):
    save_looplm(tmp_path)
    with pytest.raises(NotImplementedError, match=r"[Pp]ipeline"), engine(tmp_path, pipeline_parallel_size=2):
        pass


def test_the_bundled_teacher_answers():
    tokenizer, asked = AutoTokenizer.from_pretrained(LOOPLM), heldout(20)
    with engine(LOOPLM, skip_tokenizer_init=False) as llm:
        chats = [TokensPrompt(prompt_token_ids=prompt_ids(question, tokenizer)) for question in asked]
        outputs = llm.generate(chats, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    replies = [output.outputs[0].text.partition("</think>")[2] for output in outputs]
    assert sum(question.check(reply) for question, reply in zip(asked, replies, strict=True)) >= 18
