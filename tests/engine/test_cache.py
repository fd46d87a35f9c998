"""What is kept, shared and given back; and that each guard of the contract is needed: without it, answers go wrong."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from melt_serve.config import kv_bytes_per_token
from melt_serve.engine.cache import FinalRowsManager, FinalRowsSpec, OpenRowsSpec
from melt_serve.engine.scheduler import ChunkGridScheduler
from tests.engine.engines import distance, engine, engine_logprobs, everything, generate, prompts, save_melt

RIGHT, WRONG = 1e-4, 1e-2
MODES = pytest.mark.parametrize("mode", ["token", "chunk"])


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def metric(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def furthest(model, asked, outputs):
    return max(distance(model, prompt, output, 4) for prompt, output in zip(asked, outputs, strict=True))


@MODES
@pytest.mark.parametrize(("chunk_size", "unit"), [(32, 32), (64, 64), (96, 96)])
def test_a_prompt_asked_again_is_found_up_to_its_last_whole_chunk(tmp_path, mode, chunk_size, unit):
    model = save_melt(tmp_path, decode_mode=mode, chunk_size=chunk_size)
    asked = prompts(unit, unit + 1, 2 * unit + 20)
    with engine(tmp_path, block_size=32) as llm:
        assert furthest(model, asked, generate(llm, asked)) <= RIGHT
        assert metric(llm, "prefix_cache_hits") == 0
        assert furthest(model, asked, generate(llm, asked)) <= RIGHT
        assert metric(llm, "prefix_cache_hits") == unit + 2 * unit  # a prompt's last token is always run again


def test_hits_that_end_inside_a_chunk_would_be_wrong(tmp_path, monkeypatch):
    model = save_melt(tmp_path, chunk_size=96)
    first, second = prompts(150, 150)
    second[:64] = first[:64]
    with engine(tmp_path, block_size=32) as llm:
        generate(llm, [first])
        assert furthest(model, [second], generate(llm, [second])) <= RIGHT
        llm.reset_prefix_cache()
        generate(llm, [first])
        monkeypatch.setattr(FinalRowsSpec, "unit", 32)
        assert furthest(model, [second], generate(llm, [second])) > WRONG


@MODES
def test_stock_scheduling_would_be_wrong(tmp_path, mode):
    """Budgets cut prompts anywhere; with the grid they do not, without it they do."""
    model = save_melt(tmp_path, decode_mode=mode)
    asked = prompts(150, 90)
    with engine(tmp_path, max_num_batched_tokens=48, max_num_seqs=8, enable_prefix_caching=False) as llm:
        assert furthest(model, asked, generate(llm, asked)) <= RIGHT
        scheduler_of(llm).need_mamba_block_aligned_split = False
        assert furthest(model, asked, generate(llm, asked)) > WRONG


@MODES
def test_a_request_waits_for_the_step_that_computes_its_prefix_and_those_behind_it_do_not(tmp_path, mode, monkeypatch):
    model = save_melt(tmp_path, decode_mode=mode)
    (same, other) = prompts(100, 70)
    with engine(tmp_path) as llm:
        for number, prompt in enumerate((same, same, other)):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, everything(max_tokens=4))
        llm.llm_engine.step()
        assert [len(request.prompt_token_ids) for request in scheduler_of(llm).running] == [100, 70]
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()

        assert llm.reset_prefix_cache()
        assert furthest(model, [same, same], generate(llm, [same, same])) <= RIGHT
        assert llm.reset_prefix_cache()
        stock = AsyncScheduler._handle_blocked_waiting_request
        monkeypatch.setattr(ChunkGridScheduler, "_handle_blocked_waiting_request", stock)
        assert furthest(model, [same, same], generate(llm, [same, same])) > WRONG


def test_rows_generated_one_by_one_are_not_shared(tmp_path, monkeypatch):
    model = save_melt(tmp_path)
    (prompt,) = prompts(33)

    def ask_with_the_transcript(llm):
        (answer,) = generate(llm, [prompt], max_tokens=70)
        transcript = [[*prompt, *answer.token_ids, 5]]
        return furthest(model, transcript, generate(llm, transcript))

    with engine(tmp_path) as llm:
        assert ask_with_the_transcript(llm) <= RIGHT
        assert llm.reset_prefix_cache()
        monkeypatch.setattr(FinalRowsManager, "cacheable_tokens", lambda self, request: request.num_tokens)
        assert ask_with_the_transcript(llm) > WRONG


def test_a_replayed_request_does_not_take_grid_rows_for_its_generated_tokens(tmp_path, monkeypatch):
    """Its transcript is somebody else's prompt while it is preempted."""
    model = save_melt(tmp_path)
    (prompt,) = prompts(33)

    def preempted_for_its_transcript(llm, guarded):
        (whole,) = generate(llm, [prompt], max_tokens=100)
        assert llm.reset_prefix_cache()
        scheduler, live = scheduler_of(llm), llm.llm_engine
        live.add_request("talk", {"prompt_token_ids": prompt}, everything(max_tokens=100))
        for _ in range(80):
            live.step()
        talk = scheduler.running.pop()
        scheduler._preempt_request(talk, 0.0)
        scheduler.waiting.remove_request(talk)
        live.add_request("transcript", {"prompt_token_ids": [*prompt, *whole.token_ids]}, everything(max_tokens=1))
        while not any(output.finished for output in live.step()):
            pass
        if not guarded:
            monkeypatch.setattr(FinalRowsManager, "cacheable_tokens", lambda self, request: request.num_tokens)
        scheduler.waiting.prepend_request(talk)
        while live.has_unfinished_requests():
            for output in live.step():
                (answer,) = output.outputs
        return distance(model, prompt, answer, 4)

    with engine(tmp_path) as llm:
        assert preempted_for_its_transcript(llm, guarded=True) <= RIGHT
        assert preempted_for_its_transcript(llm, guarded=False) > WRONG


def test_in_chunk_mode_a_conversation_finds_its_own_answers_again(tmp_path):
    model = save_melt(tmp_path, decode_mode="chunk")
    (first,) = prompts(40)
    with engine(tmp_path) as llm:
        (answer,) = generate(llm, [first], max_tokens=60)
        conversation = [*first, *answer.token_ids, 7, 8, 9]
        before = metric(llm, "prefix_cache_hits")
        (turn_by_turn,) = generate(llm, [conversation])
        assert metric(llm, "prefix_cache_hits") - before == 96  # of 103 tokens, 60 of them generated
        assert llm.reset_prefix_cache()
        (at_once,) = generate(llm, [conversation])
    torch.testing.assert_close(engine_logprobs(turn_by_turn), engine_logprobs(at_once), atol=RIGHT, rtol=0)
    assert distance(model, conversation, at_once, 4) <= RIGHT


@pytest.mark.parametrize(("chunk_size", "loops"), [(32, 4), (64, 2), (64, 1), (32, 8)])
def test_open_rows_are_held_while_their_chunk_is_open(tmp_path, chunk_size, loops):
    save_melt(tmp_path, decode_mode="chunk", chunk_size=chunk_size)
    with engine(
        tmp_path,
        hf_overrides={"total_ut_steps": loops},
        max_num_batched_tokens=chunk_size + 8,
        max_num_seqs=8,
        block_size=32,
    ) as llm:
        scheduler = scheduler_of(llm)
        _, *rings = scheduler.kv_cache_manager.coordinator.single_type_managers
        assert [ring.loop for ring in rings] == list(range(1, 8))  # one less than the checkpoint's max_loops
        prompt = {"prompt_token_ids": prompts(2 * chunk_size + 5)[0]}
        llm.llm_engine.add_request("0", prompt, everything(max_tokens=2 * chunk_size))
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            for request in scheduler.running:
                begun = request.num_computed_tokens
                kept = begun % chunk_size or (chunk_size if begun > 2 * chunk_size else 0)
                for ring in rings:
                    blocks = [block for block in ring.req_to_blocks[request.request_id] if not block.is_null]
                    expected = -(-kept // 32) if ring.loop < loops else 0
                    assert len(blocks) == expected, f"after {begun} tokens, loop {ring.loop}"
        assert scheduler.kv_cache_manager.usage == 0


@MODES
@pytest.mark.parametrize("max_loops", [1, 2, 4, 8])
def test_the_engine_counts_what_is_allocated(tmp_path, mode, max_loops):
    model = save_melt(tmp_path, decode_mode=mode, total_ut_steps=1, max_loops=max_loops)
    with engine(tmp_path) as llm:
        config, scheduler = llm.llm_engine.vllm_config.cache_config, scheduler_of(llm)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in runner.kv_caches}
        groups = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
        row = kv_bytes_per_token(model.config, bytes_per_value=4)
        assert sum(storage.nbytes() for storage in storages.values()) == config.num_gpu_blocks * config.block_size * row
        blocks_of_a_request = 512 // config.block_size + len(groups) - 1
        assert config.kv_cache_size_tokens == config.num_gpu_blocks * 512 // blocks_of_a_request
    assert [type(spec) for spec in groups] == [FinalRowsSpec] + [OpenRowsSpec] * (
        max_loops - 1 if mode == "chunk" else 0
    )


def test_other_models_are_served_beside_the_plugin(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, initializer_range=0.1, **shape)).eval()
    model.save_pretrained(tmp_path)
    asked = prompts(5, 100)
    with engine(tmp_path, block_size=32) as llm:
        outputs = [generate(llm, asked), generate(llm, asked)][1]
        assert metric(llm, "prefix_cache_hits") > 0
    for prompt, output in zip(asked, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output.token_ids]])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(engine_logprobs(output), logits.log_softmax(-1), atol=RIGHT, rtol=0)
