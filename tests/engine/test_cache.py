"""What is kept, shared and given back; and that each guard of the contract is needed: without it, answers go wrong."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from melt_serve.config import kv_bytes_per_token
from melt_serve.engine.cache import FinalRowsManager, FinalRowsSpec, OpenRowsSpec
from melt_serve.engine.scheduler import ChunkGridScheduler
from tests.engine.engines import (
    KINDS,
    RIGHT,
    WRONG,
    distance,
    engine,
    engine_logprobs,
    everything,
    generate,
    on,
    prompts,
    save_melt,
    scheduler_of,
)
from tests.engine.scenes import confined, counted

MODES = on("token", "chunk")


@on(*(kind for kind in KINDS if "adapters" not in kind))
def test_a_prompt_asked_again_is_found_up_to_its_last_whole_chunk(served):
    llm, model = served
    unit = model.config.chunk_size
    asked = prompts(unit, unit + 1, 2 * unit + 20)
    for hits in (0, unit + 2 * unit):  # a prompt's last token is always run again
        with counted(scheduler_of(llm)) as counts:
            assert distance(model, asked, generate(llm, asked)) <= RIGHT
        assert counts["hit"] == hits


@on("token, chunks of 96")
def test_hits_that_end_inside_a_chunk_would_be_wrong(served, monkeypatch):
    llm, model = served
    first, second = prompts(150, 150)
    second[:64] = first[:64]
    generate(llm, [first])
    assert distance(model, [second], generate(llm, [second])) <= RIGHT
    llm.reset_prefix_cache()
    generate(llm, [first])
    monkeypatch.setattr(FinalRowsSpec, "unit", 32)
    assert distance(model, [second], generate(llm, [second])) > WRONG


@MODES
def test_stock_scheduling_would_be_wrong(served, monkeypatch):
    """Budgets cut prompts anywhere; with the grid they do not, without it they do."""
    llm, model = served
    asked, scheduler = prompts(150, 90), scheduler_of(llm)
    with confined(scheduler, budget=48):
        assert distance(model, asked, generate(llm, asked)) <= RIGHT
        assert llm.reset_prefix_cache()
        monkeypatch.setattr(scheduler, "need_mamba_block_aligned_split", False)
        assert distance(model, asked, generate(llm, asked)) > WRONG


@MODES
def test_a_request_waits_for_the_step_that_computes_its_prefix_and_those_behind_it_do_not(served, monkeypatch):
    llm, model = served
    (same, other) = prompts(100, 70)
    for number, prompt in enumerate((same, same, other)):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, everything(max_tokens=4))
    llm.llm_engine.step()
    assert [len(request.prompt_token_ids) for request in scheduler_of(llm).running] == [100, 70]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()

    assert llm.reset_prefix_cache()
    assert distance(model, [same, same], generate(llm, [same, same])) <= RIGHT
    assert llm.reset_prefix_cache()
    stock = AsyncScheduler._handle_blocked_waiting_request
    monkeypatch.setattr(ChunkGridScheduler, "_handle_blocked_waiting_request", stock)
    assert distance(model, [same, same], generate(llm, [same, same])) > WRONG


@on("token")
def test_rows_generated_one_by_one_are_not_shared(served, monkeypatch):
    llm, model = served
    (prompt,) = prompts(33)

    def ask_with_the_transcript():
        (answer,) = generate(llm, [prompt], max_tokens=70)
        transcript = [[*prompt, *answer.token_ids, 5]]
        return distance(model, transcript, generate(llm, transcript))

    assert ask_with_the_transcript() <= RIGHT
    assert llm.reset_prefix_cache()
    monkeypatch.setattr(FinalRowsManager, "cacheable_tokens", lambda self, request: request.num_tokens)
    assert ask_with_the_transcript() > WRONG


@on("token")
def test_a_replayed_request_does_not_take_grid_rows_for_its_generated_tokens(served, monkeypatch):
    """Its transcript is somebody else's prompt while it is preempted."""
    llm, model = served
    (prompt,) = prompts(33)

    def preempted_for_its_transcript(guarded):
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
        return distance(model, [prompt], [answer])

    assert preempted_for_its_transcript(guarded=True) <= RIGHT
    assert preempted_for_its_transcript(guarded=False) > WRONG


@on("chunk")
def test_in_chunk_mode_a_conversation_finds_its_own_answers_again(served):
    llm, model = served
    (first,) = prompts(40)
    (answer,) = generate(llm, [first], max_tokens=60)
    conversation = [*first, *answer.token_ids, 7, 8, 9]
    with counted(scheduler_of(llm)) as counts:
        (turn_by_turn,) = generate(llm, [conversation])
    assert counts["hit"] == 96  # of 103 tokens, 60 of them generated
    assert llm.reset_prefix_cache()
    (at_once,) = generate(llm, [conversation])
    torch.testing.assert_close(engine_logprobs(turn_by_turn), engine_logprobs(at_once), atol=RIGHT, rtol=0)
    assert distance(model, [conversation], [at_once]) <= RIGHT


@on("chunk", "chunk, chunks of 64")
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_open_rows_grow_with_the_first_open_chunk_and_are_kept_for_those_that_follow(served, loops):
    llm, chunk_size = served.llm, served.model.config.chunk_size
    scheduler = scheduler_of(llm)
    _, rows = scheduler.kv_cache_manager.coordinator.single_type_managers
    prompt = {"prompt_token_ids": prompts(2 * chunk_size + 5)[0]}
    expected = 0
    with confined(scheduler, budget=chunk_size + 8):
        parameters = everything(max_tokens=2 * chunk_size, extra_args={"loops": loops})
        llm.llm_engine.add_request("0", prompt, parameters)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            for request in scheduler.running:
                begun = request.num_computed_tokens - 2 * chunk_size  # two chunks of the prompt run whole
                expected = max(expected, (loops - 1) * -(-min(begun, chunk_size) // 32))
                blocks = rows.req_to_blocks.get(request.request_id, [])
                assert len({block.block_id for block in blocks}) == len(blocks) == expected, f"after {begun} tokens"
                assert not any(block.is_null for block in blocks)
    assert scheduler.kv_cache_manager.usage == 0
    assert expected == (loops - 1) * chunk_size // 32


@pytest.mark.parametrize(("mode", "max_loops"), [("token", 1), ("token", 8), ("chunk", 1), ("chunk", 4)])
def test_the_engine_counts_what_is_allocated(tmp_path, mode, max_loops):
    model = save_melt(tmp_path, decode_mode=mode, total_ut_steps=1, max_loops=max_loops)
    with engine(tmp_path) as llm:
        config, scheduler = llm.llm_engine.vllm_config.cache_config, scheduler_of(llm)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in runner.kv_caches}
        groups = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
        row = kv_bytes_per_token(model.config, bytes_per_value=4)
        assert sum(storage.nbytes() for storage in storages.values()) == config.num_gpu_blocks * config.block_size * row
        open_blocks = (max_loops - 1) * model.config.chunk_size // config.block_size if mode == "chunk" else 0
        blocks_of_a_request = 512 // config.block_size + open_blocks
        assert config.kv_cache_size_tokens == config.num_gpu_blocks * 512 // blocks_of_a_request
    assert [type(spec) for spec in groups] == [FinalRowsSpec, OpenRowsSpec][: 2 if open_blocks else 1]


def test_other_models_are_served_beside_the_plugin(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, initializer_range=0.1, **shape)).eval()
    model.save_pretrained(tmp_path)
    asked = prompts(5, 100)
    with engine(tmp_path, block_size=32) as llm:
        generate(llm, asked)
        with counted(scheduler_of(llm)) as counts:
            outputs = generate(llm, asked)
        assert counts["hit"] > 0
    for prompt, output in zip(asked, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output.token_ids]])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(engine_logprobs(output), logits.log_softmax(-1), atol=RIGHT, rtol=0)
