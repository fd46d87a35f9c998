"""vLLM's GPU runner (V2) on a CPU: `test_gpu_runner.py` runs these tests, in Triton's interpreter.

Eager only. On a CPU vLLM makes none of the dummy runs of a GPU's start, so tests make them.
"""

from collections import Counter
from contextlib import nullcontext
from importlib import import_module

import numpy as np
import pytest
import torch
from vllm import SamplingParams, TokensPrompt
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from melt_serve.engine import graphs
from melt_serve.engine.scheduler_stats import StepCounts
from tests.engine.adapters import EVERY_LAYER, THE_GATE, distance_with_two
from tests.engine.engines import (
    RIGHT,
    distance,
    engine,
    everything,
    generate,
    on,
    prompts,
    save_looplm,
    save_melt,
    scheduler_of,
)
from tests.engine.scenes import Ask, Scene, confined, play, scheduled_ahead
from tests.engine.test_token_loops import judge_told
from tests.engine.waits import judge_waits, watched

LENGTHS = (1, 31, 33, 64, 100)
DEPTHS = (1, 8, 4, 2, 6)
EXITS = (1.0, 0.85, 0.5, 1.0, 0.6)
CONTRASTS = ((0, 1), (1.5, 3), (2, 1), (0, 1), (0.5, 2))
MODES = on("token", "chunk")


def runner_of(llm):
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    return runner


@MODES
@pytest.mark.parametrize("exits", [None, EXITS], ids=["loops", "exits"])
def test_requests_of_mixed_depths_equal_the_reference(served, exits):
    llm, model = served
    asked = prompts(*LENGTHS)
    with confined(scheduler_of(llm), budget=96):  # a prompt takes several steps
        for contrasts in (None, CONTRASTS):  # the second time prefixes are found
            outputs = generate(llm, asked, DEPTHS, exits, contrasts, max_tokens=10)
            assert distance(model, asked, outputs, DEPTHS, exits, contrasts) <= RIGHT


@MODES
def test_a_step_waits_for_exits_alone(served):
    judge_waits(served)


@MODES
def test_decodes_come_deepest_first_so_nothing_is_gathered(served):
    with watched() as steps:
        generate(served.llm, prompts(*LENGTHS), DEPTHS, max_tokens=5)
    assert sum(not each.plan.moved for each in steps) >= 4


@MODES
@pytest.mark.parametrize("tokens", [1, 8, 96])
def test_dummy_runs_of_a_start_pass_and_leave_answers_right(served, tokens):
    """Warm-up sizes, and the step of an idle data-parallel rank."""
    llm, model = served
    runner_of(llm)._dummy_run(tokens)
    asked = prompts(70)
    assert distance(model, asked, generate(llm, asked)) <= RIGHT


@MODES
def test_the_profile_run_of_a_start_passes(served):
    runner_of(served.llm).profile_run()


@MODES
@pytest.mark.parametrize(("depth", "ends"), [(None, FinishReason.LENGTH), ({"loops": 2}, FinishReason.LENGTH)])
def test_a_request_that_no_front_end_has_seen_is_served(served, depth, ends):
    """As vLLM's own warm-up sends them, and front ends without the plugin."""
    core = served.llm.llm_engine.engine_core.engine_core
    core.add_request(*core.preprocess_add_request(bare_request(depth)))
    outputs = []
    while core.scheduler.has_requests():
        for each in core.step()[0].values():
            outputs += each.outputs
    assert sum(len(output.new_token_ids) for output in outputs) == 3 and outputs[-1].finish_reason == ends
    assert outputs[-1].kv_transfer_params["melt_loops_run"] == {4 if depth is None else 2: 3}


@MODES
def test_an_invalid_depth_that_no_front_end_has_seen_ends_its_request_only(served):
    """It raises where vLLM's engine process answers with an error, not in the scheduler, which would end the engine."""
    with pytest.raises(VLLMValidationError, match="from 1 to 8"):
        served.llm.llm_engine.engine_core.engine_core.preprocess_add_request(bare_request({"loops": 99}))
    assert len(generate(served.llm, prompts(5))[0].token_ids) == 8


def bare_request(depth):
    return EngineCoreRequest(
        request_id="bare",
        prompt_token_ids=prompts(40)[0],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=3, temperature=0, extra_args=depth),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@MODES
def test_seeded_requests_repeat_themselves(served):
    first, again, other = (
        generate(served.llm, prompts(150), temperature=1.0, seed=seed)[0].token_ids for seed in (7, 7, 8)
    )
    assert first == again != other


@MODES
def test_preempted_requests_and_steps_scheduled_ahead_change_no_answer(served, monkeypatch):
    llm, model = served
    steps = []
    monkeypatch.setattr(StepCounts, "put", lambda counts, stats: steps.append(counts))
    crowd = tuple(Ask(arrives=i, document=i % 2, shared=140, own=20, answer=30, loops=1 + i) for i in range(4))
    for scene in (Scene(crowd, budget=96, spare_blocks=0), Scene(crowd, ahead=True)):
        played = play(llm, scene)
        asked = [played.prompts[i] for i in range(4)]
        outputs = [played.answers[i, 0] for i in range(4)]
        assert distance(model, asked, outputs, [ask.loops for ask in crowd]) <= RIGHT
        assert scene.ahead or played.counts["preempted"] == sum(counts.replays for counts in steps) > 0


@MODES
@pytest.mark.parametrize("ahead", [False, True])
def test_usage_tells_the_loops_that_ran(served, ahead):
    """Also of tokens that exited early, and where the next step is scheduled before the numbers are read."""
    llm, model = served
    asked, outputs = prompts(*LENGTHS), {}
    with scheduled_ahead(llm.llm_engine.engine_core.engine_core, ahead):
        for number, (prompt, loops, threshold) in enumerate(zip(asked, DEPTHS, EXITS, strict=True)):
            depth = {"loops": loops, "exit_threshold": threshold, "return_loops": True}
            parameters = everything(12, extra_args=depth)
            llm.llm_engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), parameters)
        while llm.llm_engine.has_unfinished_requests():
            outputs |= {int(output.request_id): output for output in llm.llm_engine.step()}
    told = [outputs[number].kv_transfer_params["melt_loops_run"] for number in range(len(asked))]
    ran = [
        judge_told(model, prompt, outputs[number].outputs[0], loops, threshold)
        for number, (prompt, loops, threshold) in enumerate(zip(asked, DEPTHS, EXITS, strict=True))
    ]
    assert told == [dict(Counter(each)) for each in ran]
    assert len({loops for each in ran for loops in each}) >= 3, "exits must come at many loops, or this shows little"


@on("token, adapters")
def test_an_adapter_equals_the_reference_with_it_merged_in(served, tmp_path):
    assert distance_with_two(served.llm, served.model, tmp_path, EVERY_LAYER + THE_GATE) <= RIGHT


@pytest.fixture
def triton_attention(monkeypatch):
    """vLLM's choice of attention, which it remembers, as on a GPU.

    Decodes are split into 2 segments in place of 16: the interpreter runs one after another, the empty ones, too.
    """
    chosen = classmethod(lambda *_, **__: AttentionBackendEnum.TRITON_ATTN.get_path())
    monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", chosen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(triton_attn, "NUM_PAR_SOFTMAX_SEGMENTS", 2)
    _cached_get_attn_backend.cache_clear()
    yield
    _cached_get_attn_backend.cache_clear()


@pytest.mark.usefixtures("triton_attention")
@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_so_they_do_on_the_attention_of_a_gpu(tmp_path, mode):
    """vLLM's Triton backend: its metadata, its block tables, its layout of the cache, its write of rows.

    Also where tokens of a prompt leave between others that stay.
    """
    model = save_melt(tmp_path, decode_mode=mode, num_hidden_layers=1)
    asked, depths, exits = prompts(40, 5), [3, 4], [0.7, 0.6]
    with engine(tmp_path, block_size=32) as llm:
        (layer,) = runner_of(llm).model.model.layers
        backend = layer.self_attn.attn.attn_backend
        assert issubclass(backend, triton_attn.TritonAttentionBackend) and backend.get_builder_cls().bridges_gaps
        with watched() as steps:
            outputs = generate(llm, asked, depths, exits, max_tokens=3)
        assert distance(model, asked, outputs, depths, exits) <= RIGHT
    assert any(left_gaps(each.plan) for each in steps)


def left_gaps(plan):
    """Return whether a token ran fewer loops than some before it and some behind it in its request."""
    for first, length in zip(plan.sequences.first, np.diff(plan.sequences.starts), strict=True):
        ran = plan.ran[first : first + length]
        before, behind = np.maximum.accumulate(ran), np.maximum.accumulate(ran[::-1])[::-1]
        if (ran < np.minimum(before, behind)).any():
            return True
    return False


SIZES = [1, 2, 4, 8]
GRAPHED = ((2, 1), (0, 1), (1, 4), (0.5, 1), (2, 1))


@pytest.fixture
def capturing(monkeypatch):
    """vLLM's capture as a GPU's start calls it, with a double of CUDA graphs: it runs what was captured once more.

    The double sees nothing but the graphs' buffers: what was copied to them is NaN by then, and so are rows behind the
    step's tokens; the runner's own positions, lengths, tables and slots say something else.

    Returns a function of a runner, which captures, and lists what is replayed: the key, and the number of tokens.
    """
    import_module("vllm.v1.worker.cpu.shm")  # it has its own for torch.accelerator, once it is imported
    monkeypatch.setattr(CpuPlatform, "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(model_runner, "lock_workspace", lambda: None)
    monkeypatch.setattr(graphs, "graph_capture", lambda device: nullcontext())
    copy = graphs.put

    def move(values, buffer):
        copy(values, buffer)
        if values.data_ptr() != buffer.data_ptr():
            values.fill_(torch.nan)

    def capture(runner):
        replayed, live = [], runner.model_state.graphs
        inputs, tables = runner.input_buffers, runner.block_tables
        outside = [inputs.positions, inputs.seq_lens, inputs.query_start_loc]
        outside += [tables.slot_mappings, *tables.input_block_tables]

        captured = []

        class Double:
            def __init__(self, run):
                self.run = run
                captured.append(self)

            def replay(self):
                (key,) = (key for key, graph in live.graphs.items() if graph is self)
                tokens = int(live.query_starts[key[1]])
                assert (live.slots[tokens : key[1]] == PAD_SLOT_ID).all() and not live.seq_lens[tokens : key[1]].any()
                replayed.append((key, tokens))
                live.x[tokens:] = torch.nan
                live.h[:, tokens:] = torch.nan
                before = [each.clone() for each in outside]
                for each in outside:
                    each.fill_(1)
                self.run()
                for each, values in zip(outside, before, strict=True):
                    each.copy_(values)

        monkeypatch.setattr(graphs, "put", move)
        monkeypatch.setattr(graphs, "record", lambda run, config: Double(run))
        mode, config = CUDAGraphMode.FULL_DECODE_ONLY, runner.compilation_config
        config.cudagraph_mode, config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = (
            mode,
            SIZES,
            SIZES[-1],
        )
        live.sizes = SIZES
        runner.cudagraph_manager = ModelCudaGraphManager(runner.vllm_config, runner.device, mode, 1)
        assert runner.needs_cudagraph_capture()
        live.sizes = SIZES[:1]
        runner.capture_model(profile_only=True)
        assert captured
        assert not live.graphs and not hasattr(live, "h"), "vLLM measures graphs before it makes room for the KV cache"
        live.sizes = SIZES
        runner.capture_model()
        assert not runner.cudagraph_manager.graphs, "a whole step's graph replays the default depth for all"
        assert set(live.graphs) == {(kind, size) for kind in range(1, live.kinds + 1) for size in SIZES}
        return replayed

    return capture


@pytest.mark.usefixtures("triton_attention")
@pytest.mark.parametrize(("mode", "bias"), [("token", "shared"), ("chunk", "loop")])
def test_graphs_of_a_loop_give_what_eager_loops_give(tmp_path, capturing, mode, bias):
    """Depths that change between steps, tokens that leave, exits, sizes between two captured ones."""
    model = save_melt(tmp_path, decode_mode=mode, num_hidden_layers=1, kv_gate_bias=bias)
    asked, loops, exits = prompts(40, 5, 33, 20, 7), [3, 1, 6, 3, 2], [1.0, 1.0, 0.5, 0.6, 1.0]
    with engine(tmp_path, block_size=32) as llm:
        replayed = capturing(runner_of(llm))
        for depths, thresholds, contrasts in (
            (loops, None, None),
            (loops, exits, GRAPHED),
            (2, None, None),
        ):
            outputs = generate(llm, asked, depths, thresholds, contrasts, told=contrasts is not None, max_tokens=4)
            assert distance(model, asked, outputs, depths, thresholds, contrasts) <= RIGHT
            if contrasts is not None:
                for each in zip(asked, outputs, depths, thresholds, strict=True):
                    judge_told(model, *each)
        assert {key for key, _ in replayed} >= {(1, 8), (2, 8), (2, 4), (2, 1)}
        assert any(tokens < size for (_, size), tokens in replayed)
        count = len(replayed)
        outputs = generate(llm, asked[:1], max_tokens=1)  # a prompt
        assert len(replayed) == count
        runner_of(llm).model_state.initialize_kv_cache(runner_of(llm).kv_cache_config, runner_of(llm).block_tables)
        generate(llm, asked[:1], max_tokens=2)
        assert len(replayed) == count, "graphs of another KV cache are gone"


@pytest.mark.usefixtures("triton_attention")
def test_a_looplms_requests_of_mixed_depths_equal_the_reference_in_graphs_and_without(tmp_path, capturing):
    model = save_looplm(tmp_path, num_hidden_layers=1, max_loops=6)
    asked, loops, exits = prompts(40, 5, 33, 20, 7), [3, 1, 6, 3, 2], [1.0, 1.0, 0.5, 0.6, 1.0]
    with engine(tmp_path, block_size=32) as llm:
        runner_of(llm)._dummy_run(8)
        replayed = capturing(runner_of(llm))
        for depths, thresholds, contrasts in (
            (loops, None, None),
            (loops, exits, GRAPHED),
            (2, None, None),
        ):
            outputs = generate(llm, asked, depths, thresholds, contrasts, told=contrasts is not None, max_tokens=4)
            assert distance(model, asked, outputs, depths, thresholds, contrasts) <= RIGHT
        assert {key for key, _ in replayed} == {(1, size) for size in SIZES}, "one graph serves all loops"
