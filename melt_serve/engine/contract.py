"""The serving contract at start-up: what MELT needs is set, what would break it is refused.

The contract (engine/README.md): up to rounding, the output is a function of the tokens, the weights,
the loops, C and the decode mode alone. Rule 6 lists what cannot keep it.
"""

from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from vllm.config import CUDAGraphMode
from vllm.config.vllm import OptimizationLevel
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from melt_serve.config import LoopLMConfig, MeltConfig, sharing_unit
from melt_serve.engine import patches
from melt_serve.engine.depth_drafts import DRAFTER, draft_loops, drafts_by_depth
from melt_serve.kernels import dispatch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.melt_serve")

SCHEDULER = "melt_serve.engine.scheduler.ChunkGridScheduler"
LOOPLM_SCHEDULER = "melt_serve.engine.looplm_scheduler.LoopLMScheduler"
CPU_WORKER = "melt_serve.engine.cpu_worker.MeltCPUWorker"
MOST_DRAFTS = 128
"""vLLM's rejection sampler takes no more (MAX_SPEC_LEN), and finds out in the middle of a step."""


class MeltStartup(VerifyAndUpdateConfig):
    """vLLM's hook for a model's own configuration, which plain `vllm serve` calls, too."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Apply our patches, before vLLM chooses its defaults for this model."""
        patches.apply()
        patches.serve_as_published()

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot keep the contract, then choose scheduler and worker.

        Raises:
            ValueError: the first option that cannot be kept; the message names it and the remedy.
        """
        refuse_checkpoint(vllm_config.model_config.hf_config)
        refuse_small_steps(vllm_config)
        refuse_parallelism(vllm_config)
        refuse_features(vllm_config)

        choose_block_size(vllm_config)
        track_quantized_weights(vllm_config)
        record_kernels(vllm_config)
        choose_graphs(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        choose_cpu_worker(vllm_config)


class LoopLMStartup(VerifyAndUpdateConfig):
    """The same hook for a LoopLM, which has no chunk grid: only what concerns requests of mixed depths."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Apply our patches, before vLLM chooses its defaults for this model."""
        patches.apply()
        patches.serve_as_published()

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot keep depths apart, then choose scheduler and worker.

        Raises:
            ValueError: the first setting or option that cannot be kept; the message names it and the remedy.
        """
        config: LoopLMConfig = vllm_config.model_config.hf_config
        refuse_checkpoint(config)
        refuse_parallelism(vllm_config)
        refuse_moved_rows(vllm_config)
        refuse_drafts(vllm_config)
        refuse_other_runs(vllm_config, LOOPLM_SCHEDULER)
        if config.most_loops > config.total_ut_steps:
            logger.warning(
                "LoopLM: requests may ask for up to max_loops=%d loops, the checkpoint runs %d by default: how it "
                "answers beyond what it was trained at is not known",
                config.most_loops,
                config.total_ut_steps,
            )
        track_quantized_weights(vllm_config)
        record_kernels(vllm_config)
        choose_graphs(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = LOOPLM_SCHEDULER
        choose_cpu_worker(vllm_config)


def choose_graphs(vllm_config: "VllmConfig") -> None:
    """Have CUDA graphs captured for decodes (`graphs.py`), unless the user wants none. With adapters there are none."""
    compilation = vllm_config.compilation_config
    # An optimization level's own choice is made after this.
    unset, plain = compilation.cudagraph_mode is None, vllm_config.optimization_level == OptimizationLevel.O0
    unwanted = compilation.cudagraph_mode == CUDAGraphMode.NONE or (unset and plain)
    wanted = not unwanted and vllm_config.lora_config is None
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if wanted else CUDAGraphMode.NONE


def choose_cpu_worker(vllm_config: "VllmConfig") -> None:
    """Choose our worker on a CPU, unless the user named one."""
    if current_platform.is_cpu() and vllm_config.parallel_config.worker_cls == "auto":
        vllm_config.parallel_config.worker_cls = CPU_WORKER


def refuse_checkpoint(config: LoopLMConfig) -> None:
    """Refuse settings of the checkpoint, or of `--hf-overrides`, that are not valid."""
    try:
        config.validate()  # again: overrides are set without it
    except StrictDataclassError as error:
        raise ValueError(f"{config.family}: {error.__cause__ or error}") from None


def family_of(vllm_config: "VllmConfig") -> str:
    """Return what messages call a model of this kind."""
    return vllm_config.model_config.hf_config.family


def track_quantized_weights(vllm_config: "VllmConfig") -> None:
    """Let vLLM refuse a quantized checkpoint that lacks a scale, which it does only where it is asked to."""
    load = vllm_config.load_config
    if vllm_config.model_config.quantization is not None and load.load_format in ("auto", "safetensors"):
        load.model_loader_extra_config.setdefault("enable_weights_track", True)


def refuse_small_steps(vllm_config: "VllmConfig") -> None:
    """Refuse limits that would cut a prompt inside a chunk: in `token` mode a chunk runs whole."""
    config: MeltConfig = vllm_config.model_config.hf_config
    if config.decode_mode == "chunk":
        return
    scheduler = vllm_config.scheduler_config
    chunk_size = config.chunk_size
    limits = {
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--max-num-scheduled-tokens": scheduler.max_num_scheduled_tokens,
        "--long-prefill-token-threshold": scheduler.long_prefill_token_threshold or None,
    }
    for flag, limit in limits.items():
        if limit is not None and limit < chunk_size:
            raise ValueError(
                f"MELT: {flag}={limit} is below this checkpoint's chunk_size={chunk_size}, "
                f"so no prompt chunk could ever run whole; raise it to {chunk_size} or more"
            )


def refuse_parallelism(vllm_config: "VllmConfig") -> None:
    """Refuse splits of the model or the step that loops or chunks cannot cross."""
    family, parallel = family_of(vllm_config), vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"{family}: --pipeline-parallel-size={parallel.pipeline_parallel_size} cannot work: every loop's last "
            "layer feeds the next loop's first; use --tensor-parallel-size or --data-parallel-size"
        )
    for flag, size in (
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise ValueError(
                f"{family}: {flag}={size}: context parallelism is not proved for shared rows; leave it at 1"
            )
    if current_platform.is_cpu() and (parallel.use_ray or parallel.data_parallel_backend == "ray"):
        raise ValueError(
            f"{family}: --distributed-executor-backend or --data-parallel-backend=ray: vLLM cannot place Ray's workers "
            "on a CPU; leave it out, and processes of vLLM's own do the work (mp)"
        )
    if parallel.use_ubatching:
        raise ValueError(
            f"{family}: micro-batch overlap (--enable-dbo, --ubatch-size) is not proved for shared rows; leave it off"
        )


def refuse_features(vllm_config: "VllmConfig") -> None:
    """Refuse features that move, share or guess rows in ways the contract does not cover."""
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "MELT: --disable-hybrid-kv-cache-manager: an open chunk's rows need cache groups of their own; leave it out"
        )
    if (interval := vllm_config.scheduler_config.prefill_schedule_interval) > 1:
        raise ValueError(
            f"MELT: --prefill-schedule-interval={interval} could hold a prompt back in the very step whose budget is "
            "kept for it; leave it out"
        )
    refuse_moved_rows(vllm_config)
    config: MeltConfig = vllm_config.model_config.hf_config
    if vllm_config.speculative_config is not None and config.decode_mode == "token":
        raise ValueError(
            "MELT: --speculative-config: drafts cannot be verified together where every generated token is a chunk of "
            "its own, as decode_mode='token' has it; decode in chunks, if the checkpoint was trained for that: "
            """--hf-overrides '{"decode_mode": "chunk"}', or leave it out"""
        )
    refuse_drafts(vllm_config)
    if vllm_config.speculative_config is not None and (
        not current_platform.is_cpu() or vllm_config.use_v2_model_runner
    ):
        raise ValueError(
            "MELT: --speculative-config is not proved on vLLM's model runner V2, which every GPU has; leave it out"
        )
    if vllm_config.lora_config is not None and vllm_config.lora_config.fully_sharded_loras:
        raise ValueError(
            "MELT: --fully-sharded-loras: adapters of k_proj and v_proj are not split over ranks; leave it out"
        )
    refuse_other_runs(vllm_config, SCHEDULER)


def refuse_moved_rows(vllm_config: "VllmConfig") -> None:
    """Refuse features that move rows, or store them by layer, in ways that know of no loops."""
    family = family_of(vllm_config)
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            f"{family}: --kv-transfer-config: KV connectors are not proved for rows of loops; leave it out"
        )
    if vllm_config.cache_config.kv_offloading_size is not None:
        raise ValueError(f"{family}: --kv-offloading-size: KV offload is not proved for rows of loops; leave it out")
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        raise ValueError(
            f"{family}: --kv-cache-dtype-skip-layers: rows of all layers and loops share blocks, so they have one "
            "dtype; leave it out"
        )


def refuse_drafts(vllm_config: "VllmConfig") -> None:
    """Refuse drafts that are not verified by the tokens alone, or made by a model that knows of no loops."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return
    family = family_of(vllm_config)
    if drafts_by_depth(vllm_config):
        draft_loops(vllm_config)
        if not current_platform.is_cpu() or vllm_config.use_v2_model_runner:
            raise ValueError(f"{family}: drafts by depth run on a CPU only, in vLLM's model runner V1; draft by ngram")
        if vllm_config.lora_config is not None:
            raise ValueError(
                f"{family}: drafts by depth know of no adapters; leave --enable-lora out, or draft by ngram"
            )
    elif drafts.method != "ngram":
        raise ValueError(
            f"{family}: --speculative-config with the method {drafts.method} is not proved: what drafts there knows no "
            f"plan of the step; choose the method ngram, or the model {DRAFTER}, or leave it out"
        )
    if drafts.num_speculative_tokens > MOST_DRAFTS:
        raise ValueError(
            f"{family}: --speculative-config with num_speculative_tokens={drafts.num_speculative_tokens}: vLLM "
            f"verifies at most {MOST_DRAFTS} together"
        )
    if drafts.rejection_sample_method == "synthetic":
        raise ValueError(
            f"{family}: --speculative-config with rejection_sample_method=synthetic takes drafts that are wrong; leave "
            "it out"
        )


def refuse_other_runs(vllm_config: "VllmConfig", scheduler: str) -> None:
    """Refuse workers, runners and schedulers that do not know a request's depth; `scheduler` is the one that does."""
    family = family_of(vllm_config)
    worker_cls = vllm_config.parallel_config.worker_cls
    if current_platform.is_cpu() and worker_cls not in ("auto", CPU_WORKER):
        raise ValueError(
            f"{family}: --worker-cls={worker_cls} does not pass requests' depths on; leave it out to get {CPU_WORKER}"
        )
    if not current_platform.is_cpu() and not vllm_config.use_v2_model_runner:
        raise ValueError(
            f"{family}: vLLM would use its older model runner (V1), which does not pass requests' depths on; leave out "
            "VLLM_USE_V2_MODEL_RUNNER=0, and what vLLM's log says that V2 does not support"
        )
    if vllm_config.model_config.runner_type != "generate":
        raise ValueError(
            f"{family}: --runner={vllm_config.model_config.runner_type}: looped models generate text; leave it out"
        )
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    if scheduler_cls not in (None, scheduler):
        raise ValueError(
            f"{family}: --scheduler-cls={scheduler_cls} does not know requests' depths; leave it out to get {scheduler}"
        )


def record_kernels(vllm_config: "VllmConfig") -> None:
    """Record in vLLM's configuration which kernels run: a graph that was compiled and kept with others is not reused.

    Raises:
        ValueError: `MELT_KERNELS` is none of the words it may be.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[dispatch.VARIABLE] = dispatch.chosen()


def choose_block_size(vllm_config: "VllmConfig") -> None:
    """Make blocks end where chunks end, unless the user named a block size.

    Raises:
        ValueError: `chunk` mode, and the chunk size is not a multiple of the block size.
    """
    cache = vllm_config.cache_config
    config: MeltConfig = vllm_config.model_config.hf_config
    chunk_size = config.chunk_size
    # What vLLM's attention kernels take. Larger blocks make shorter tables; on a GPU, where many requests run, a block
    # of 64 wastes less of a request's last one than a larger block would.
    finest, coarsest, default = (32, 128, 128) if current_platform.is_cpu() else (16, 64, 16)
    if not cache.user_specified_block_size:
        fitting = [size for size in range(finest, coarsest + 1, finest) if chunk_size % size == 0]
        cache.block_size = max(fitting, default=default)
        cache.user_specified_block_size = True  # else vLLM would replace it by its own default later
    if config.decode_mode == "chunk" and chunk_size % cache.block_size:
        raise ValueError(
            f"MELT: chunk_size={chunk_size} is not a multiple of the KV block size, {cache.block_size}, as "
            f"decode_mode='chunk' needs it; name a --block-size that divides it, or decode with C=1: "
            """--hf-overrides '{"decode_mode": "token"}'"""
        )
    if (unit := sharing_unit(chunk_size, cache.block_size)) > chunk_size:
        logger.warning(
            "MELT: prefixes are shared in pieces of %d tokens, the least common multiple of chunk_size=%d and the KV "
            "block size, %d; a --block-size that divides the chunk size shares more",
            unit,
            chunk_size,
            cache.block_size,
        )
