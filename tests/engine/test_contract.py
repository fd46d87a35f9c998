"""What cannot keep the serving contract is refused at start-up, or for a request, each with its own message."""

import asyncio
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, EngineArgs, SamplingParams
from vllm.config.cache import CacheDType
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.executor import ray_utils

from melt_serve import serve
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.engine import attention, contract, patches, plugin
from melt_serve.engine.contract import CPU_WORKER, SCHEDULER
from melt_serve.engine.depth_drafts import DRAFTER
from melt_serve.task.evaluate import heldout
from melt_serve.task.tokenizer import prompt_ids
from tests.engine.engines import engine, generate, on, prompts, save_melt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("melt")
    save_melt(path, chunk_size=64)
    return path


def configure(path, **arguments):
    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512}
    return EngineArgs(model=str(path), **{**defaults, **arguments}).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_batched_tokens": 63}, "--max-num-batched-tokens=63 is below this checkpoint's chunk_size=64"),
        ({"max_num_scheduled_tokens": 63}, "--max-num-scheduled-tokens=63 is below"),
        ({"long_prefill_token_threshold": 63}, "--long-prefill-token-threshold=63 is below"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size=2 cannot work"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size=2: context parallelism",
        ),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size=2: context parallelism"),
        ({"enable_dbo": True}, "micro-batch overlap"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager: an open chunk's rows"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config: KV connectors",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size: KV offload"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "--speculative-config: drafts cannot be verified together .* decode in chunks",
        ),
        ({"enable_lora": True, "fully_sharded_loras": True}, "--fully-sharded-loras: adapters of k_proj and v_proj"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers: rows of all layers"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "does not pass requests' depths on"),
        ({"prefill_schedule_interval": 2}, "--prefill-schedule-interval=2 could hold a prompt back"),
        ({"runner": "pooling", "convert": "embed"}, "--runner=pooling: looped models generate text"),
        ({"hf_overrides": {"effort_loops": {"low": 9}}}, "effort_loops: low=9 is outside"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "does not know requests' depths"),
        ({"hf_overrides": {"decode_mode": "chunk"}, "block_size": 128}, "is not a multiple of the KV block size, 128"),
        ({"hf_overrides": {"decode_mode": "chunk", "chunk_size": 24}}, "chunk_size=24 is not a multiple"),
        ({"hf_overrides": {"total_ut_steps": 9}}, "total_ut_steps=9 is outside"),
        ({"hf_overrides": {"chunk_size": 0}}, "chunk_size must be at least 1, not 0"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_breaks_the_contract_is_refused_at_start(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        configure(checkpoint, **arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"total_ut_steps": 0}, "total_ut_steps must be at least 1, not 0"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
    ],
)
def test_a_looplms_overrides_are_checked_as_a_melts(overrides, message):
    with pytest.raises(ValueError, match=message):
        configure(LOOPLM, hf_overrides=overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size=2 cannot work"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size: "),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls=vllm"),
        ({"hf_overrides": {"total_ut_steps": 0}}, "total_ut_steps must be at least 1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_on_both_names_the_model_that_is_served(checkpoint, arguments, message):
    for folder, family in ((LOOPLM, "LoopLM"), (checkpoint, "MELT")):
        with pytest.raises(ValueError, match=f"{family}: {message}"):
            configure(folder, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
        {"data_parallel_size": 2, "data_parallel_backend": "ray"},
    ],
    ids="+".join,
)
def test_on_a_cpu_rays_workers_are_refused(checkpoint, monkeypatch, arguments):
    """With Ray installed, vLLM would say it late, and one of the two in an assertion about no device's name."""
    monkeypatch.setattr(ray_utils, "ray", SimpleNamespace())
    with pytest.raises(ValueError, match="vLLM cannot place Ray's workers on a CPU; leave it out"):
        configure(checkpoint, **arguments)


@pytest.mark.parametrize(
    ("drafts", "message"),
    [
        ({"method": "draft_model"}, "the method draft_model is not proved"),
        ({"method": "ngram_gpu", "prompt_lookup_max": 2}, "the method ngram_gpu is not proved"),
        ({"method": "custom_class", "model": "a.Proposer"}, "the method custom_class is not proved"),
        ({"method": "ngram", "num_speculative_tokens": 129}, "num_speculative_tokens=129: vLLM verifies at most 128"),
        (
            {
                "method": "ngram",
                "prompt_lookup_max": 2,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": [0.5, 0.5],
            },
            "rejection_sample_method=synthetic takes drafts that are wrong",
        ),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_drafts_of_methods_that_are_not_proved_are_refused_by_name(checkpoint, drafts, message):
    in_chunks = {"hf_overrides": {"decode_mode": "chunk"}}
    for folder, family, options in ((LOOPLM, "LoopLM", {}), (checkpoint, "MELT", in_chunks)):
        asked = {"model": str(folder), "num_speculative_tokens": 2, **drafts}
        with pytest.raises(ValueError, match=f"{family}: --speculative-config with .*{message}"):
            configure(folder, speculative_config=asked, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_config": {"draft_loops": 0}}, "draft_loops=0 of --additional-config must be .* from 1 to 7"),
        ({"additional_config": {"draft_loops": 8}}, "draft_loops=8 of"),
        ({"additional_config": {"draft_loops": "2"}}, "draft_loops='2' of"),
        ({"enable_lora": True}, "drafts by depth know of no adapters"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_drafts_by_depth_need_loops_below_a_requests_and_no_adapters(checkpoint, options, message):
    drafts = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 2}
    assert serve.DRAFTER == DRAFTER
    with pytest.raises(ValueError, match=f"MELT: {message}"):
        configure(checkpoint, speculative_config=drafts, hf_overrides={"decode_mode": "chunk"}, **options)


def test_drafts_by_depth_are_refused_on_vllms_gpu_runner(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    drafts = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="drafts by depth run on a CPU only"):
        configure(LOOPLM, speculative_config=drafts)


def test_drafts_of_ngrams_are_taken_where_chunks_stay_open_and_no_step_is_scheduled_ahead_of_them(checkpoint):
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    config = configure(checkpoint, speculative_config=drafts, hf_overrides={"decode_mode": "chunk"})
    assert config.num_speculative_tokens == 2 and not config.scheduler_config.async_scheduling


def test_drafts_are_refused_on_vllms_gpu_runner(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="MELT: --speculative-config is not proved on vLLM's model runner V2"):
        configure(checkpoint, speculative_config=drafts, hf_overrides={"decode_mode": "chunk"})


def test_on_a_gpu_vllms_older_runner_is_refused(checkpoint, monkeypatch):
    """It would serve every request at the checkpoint's own depth, without a word."""
    config = configure(checkpoint)
    monkeypatch.setattr(contract, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    contract.refuse_features(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="older model runner"):
        contract.refuse_features(config)


@pytest.mark.parametrize("name", ["FLASHINFER", "FLEX_ATTENTION"])
def test_attention_backends_that_plan_their_tables_before_the_step_are_refused(name):
    def layer(backend):
        return SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend))

    with pytest.raises(ValueError, match=f"{name} cannot change block tables.* --attention-backend FLASH_ATTN"):
        attention.refuse_backend(layer(name))
    for backend in attention.BACKENDS:
        attention.refuse_backend(layer(backend))


@pytest.mark.parametrize("dtype", sorted({*get_args(CacheDType)} - {"auto", "float16", "bfloat16", "fp8", "fp8_e4m3"}))
def test_rows_of_a_dtype_that_is_not_proved_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"--kv-cache-dtype={dtype} is not proved .* choose one of auto, .*fp8"):
        attention.refuse_rows(SimpleNamespace(kv_cache_dtype=dtype))
    attention.refuse_rows(SimpleNamespace(kv_cache_dtype="fp8"))


def test_every_layer_is_asked(checkpoint, monkeypatch):
    """Rows of a dtype that vLLM's CPU attention takes."""
    with pytest.raises(ValueError, match="fp8_e5m2 is not proved"), engine(checkpoint, kv_cache_dtype="fp8_e5m2"):
        pass


def test_graphs_compiled_with_other_kernels_are_other_graphs(checkpoint, monkeypatch):
    hashes = set()
    for kernels in ("auto", "reference"):
        monkeypatch.setenv("MELT_KERNELS", kernels)
        hashes.add(configure(checkpoint).compute_hash())
    assert len(hashes) == 2
    monkeypatch.setenv("MELT_KERNELS", "fast")
    with pytest.raises(ValueError, match="MELT_KERNELS='fast' is none of auto, triton, reference"):
        configure(checkpoint)


def test_a_budget_of_exactly_one_chunk_is_served(checkpoint):
    assert configure(checkpoint, max_num_batched_tokens=64).scheduler_config.max_num_batched_tokens == 64


def test_a_budget_below_one_chunk_is_served_in_chunk_mode(checkpoint):
    config = configure(checkpoint, max_num_batched_tokens=16, max_num_seqs=8, hf_overrides={"decode_mode": "chunk"})
    assert config.scheduler_config.max_num_batched_tokens == 16


@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_defaults_are_set_for_melt_under_plain_vllm(checkpoint, mode):
    config = configure(checkpoint, hf_overrides={"decode_mode": mode})
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.parallel_config.worker_cls == CPU_WORKER


@pytest.mark.parametrize(
    ("chunk_size", "block_size"), [(32, 32), (64, 64), (160, 32), (192, 96), (512, 128), (500, 128), (8, 128)]
)
def test_an_unnamed_block_size_divides_the_chunk_size_where_it_can(checkpoint, chunk_size, block_size):
    config = configure(checkpoint, hf_overrides={"chunk_size": chunk_size})
    assert config.cache_config.block_size == block_size


@pytest.mark.parametrize(("chunk_size", "block_size"), [(16, 16), (48, 48), (64, 64), (96, 48), (512, 64), (500, 16)])
def test_on_a_gpu_blocks_are_of_64_tokens_where_they_divide_the_chunk_size(
    checkpoint, monkeypatch, chunk_size, block_size
):
    config = configure(checkpoint, hf_overrides={"chunk_size": chunk_size})
    config.cache_config.user_specified_block_size = False
    monkeypatch.setattr(contract, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    contract.choose_block_size(config)
    assert config.cache_config.block_size == block_size


def test_a_named_block_size_stays_and_what_it_costs_is_said(checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(contract.logger.parent, "propagate", True)  # vLLM keeps its records to itself
    assert configure(checkpoint, block_size=96).cache_config.block_size == 96
    assert "prefixes are shared in pieces of 192 tokens" in caplog.text


def test_an_unset_budget_holds_a_chunk_and_every_running_request(checkpoint):
    unset = configure(checkpoint, max_num_seqs=7, max_model_len=1024, hf_overrides={"chunk_size": 9000})
    assert unset.scheduler_config.max_num_batched_tokens == 9007
    assert configure(checkpoint, max_num_seqs=7).scheduler_config.max_num_batched_tokens < 9007


def test_on_a_gpu_decodes_get_graphs_unless_nobody_wants_them(checkpoint, monkeypatch):
    """vLLM then asks for a capture; a graph of a whole step, its default, would be chosen for prompts, too."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(CpuPlatform, "support_static_graph_mode", classmethod(lambda cls: True))
    modes = [
        configure(checkpoint, **options).compilation_config.cudagraph_mode
        for options in (
            {},
            {"enforce_eager": True},
            {"compilation_config": {"cudagraph_mode": "NONE"}},
            {"compilation_config": {"cudagraph_mode": "FULL"}},
            {"optimization_level": 0},
            {"enable_lora": True},
        )
    ]
    graphs, none = CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE
    assert modes == [graphs, none, none, graphs, none, none]


def test_registering_and_patching_again_changes_nothing():
    plugin.register()
    patches.apply()
    before = LLM.beam_search
    plugin.register()
    patches.apply()
    assert LLM.beam_search is before


@on("token")
def test_beam_search_is_refused_in_token_mode_and_the_engine_lives_on(served):
    with pytest.raises(VLLMValidationError, match="no beam search"):
        served.llm.beam_search([{"prompt_token_ids": [1, 2, 3]}], BeamSearchParams(beam_width=2, max_tokens=2))
    assert len(generate(served.llm, prompts(70))[0].token_ids) == 8


@torch.no_grad()
def test_in_chunk_mode_beams_score_as_the_reference_scores_them():
    """Every step of a beam search sends generated tokens back as a prompt, which chunk mode does not mind."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MELT).eval(), AutoTokenizer.from_pretrained(MELT)
    model.config.decode_mode = "chunk"
    prompt = prompt_ids(heldout(1)[0], tokenizer)
    with engine(MELT, skip_tokenizer_init=False, hf_overrides={"decode_mode": "chunk"}) as llm:
        beams = BeamSearchParams(beam_width=3, max_tokens=40, ignore_eos=True)
        (output,) = llm.beam_search([{"prompt_token_ids": prompt}], beams)
    assert len(output.sequences) == 3
    for beam in output.sequences:
        logprobs = model(torch.tensor([beam.tokens])).logits[0].log_softmax(-1)
        scores = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(beam.tokens[len(prompt) :])[:, None])
        assert beam.cum_logprob == pytest.approx(scores.sum().item(), abs=1e-2)


def test_a_resumable_session_is_refused_and_the_engine_lives_on(checkpoint):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512, "enforce_eager": True}
    parameters = SamplingParams(max_tokens=4, detokenize=False, output_kind=RequestOutputKind.DELTA)

    async def pieces():
        yield StreamingInput(prompt={"prompt_token_ids": [1, 2, 3]})
        yield StreamingInput(prompt={"prompt_token_ids": [4, 5, 6]})

    async def talk():
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(checkpoint), kv_cache_memory_bytes=32 << 20, **arguments)
        )
        try:
            with pytest.raises(VLLMValidationError, match="cannot resume a session"):
                async for _ in llm.generate(pieces(), parameters, "streamed"):
                    pass
            return [output async for output in llm.generate({"prompt_token_ids": [1, 2, 3]}, parameters, "whole")]
        finally:
            llm.shutdown()

    assert asyncio.run(talk())[-1].finished
