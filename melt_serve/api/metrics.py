"""What `/metrics` shows of MELT's cache and chunk grid, beside vLLM's own.

The scheduler's counts (`engine/scheduler_stats.py`) arrive with every step's statistics and become metrics through
vLLM's stat-logger plugins. `engine/usage.py` shows what is known of finished requests.
"""

import os
from collections.abc import Sequence
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.stats import SchedulerStats

from melt_serve.config import LoopLMConfig, MeltConfig, kv_bytes_per_token
from melt_serve.engine.scheduler_stats import StepCounts

ENGINE = ["engine"]
"""The label with an engine's number; with data parallelism there are several engines."""


def gauge(name: str, text: str) -> prometheus_client.Gauge:
    """Make a gauge that shows the value of the API server that set it last."""
    return prometheus_client.Gauge(name, text, ENGINE, multiprocess_mode="mostrecent")


ROW_BYTES = gauge("melt_kv_bytes_per_token", "Bytes of a token's KV rows, over all layers, at the default loops.")
CAPACITY = gauge("melt_kv_capacity_tokens", "Tokens that the KV cache has room for, at the default loops.")
TRANSIENT = gauge(
    "melt_transient_state_bytes", "Bytes of the gate's states h, of all layers, in a step as large as steps may be."
)
FINAL_ROWS = gauge("melt_kv_final_rows_bytes", "Bytes of KV blocks that hold final rows of requests in the cache.")
OPEN_ROWS = gauge(
    "melt_kv_open_rows_bytes", "Bytes of KV blocks that running requests hold for an open chunk's rows of single loops."
)
LOOPLM_ROWS = gauge(
    "melt_kv_looplm_bytes", "Bytes that a LoopLM's KV rows would take for the same tokens at the same loops."
)
STEPS = prometheus_client.Counter("melt_steps", "Steps that have ended.", ENGINE)
PIECES = prometheus_client.Counter("melt_grid_pieces", "Pieces of requests that ran in steps.", ENGINE)
CUTS = prometheus_client.Counter(
    "melt_grid_cuts", "Pieces that ended with their chunk, though there were tokens and budget for more.", ENGINE
)
WAITS = prometheus_client.Counter(
    "melt_grid_waits", "Pieces put off because the step's budget ended inside their chunk.", ENGINE
)
LOST_HITS = prometheus_client.Counter(
    "melt_prefix_hit_tokens_lost", "Tokens found in the prefix cache, but behind the last place a hit may end.", ENGINE
)
REPLAYS = prometheus_client.Counter("melt_replays", "Requests that ran again after they were preempted.", ENGINE)
REPLAYED_TOKENS = prometheus_client.Counter(
    "melt_replayed_tokens", "Tokens that ran again because their request was preempted.", ENGINE
)


class MeltMetrics(AggregateStatLoggerBase):
    """A stat logger, which vLLM loads in every API server; of other models than ours it counts the steps alone."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Sequence[int]):
        self.engines = list(engine_indexes)
        self.vllm_config = vllm_config
        self.block_bytes = 0

    def log_engine_initialized(self) -> None:
        """Show what does not change, once the engine knows its cache."""
        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        config = model.hf_config
        if not isinstance(config, LoopLMConfig):
            return
        self.block_bytes = row_bytes(self.vllm_config, loops=1) * cache.block_size
        for engine in self.engines:
            ROW_BYTES.labels(engine).set(row_bytes(self.vllm_config))
            CAPACITY.labels(engine).set(capacity_tokens(self.vllm_config))
            if isinstance(config, MeltConfig):
                tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
                states = config.num_hidden_layers * tokens * config.hidden_size
                TRANSIENT.labels(engine).set(states * model.dtype.itemsize)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Show the numbers of a step, if its statistics have ours."""
        if scheduler_stats is not None:
            STEPS.labels(engine_idx).inc()
        counts = None if scheduler_stats is None else StepCounts.take(scheduler_stats)
        if counts is None:
            return
        for metric, count in (
            (PIECES, counts.pieces),
            (CUTS, counts.cuts),
            (WAITS, counts.deferred),
            (LOST_HITS, counts.lost_hit_tokens),
            (REPLAYS, counts.replays),
            (REPLAYED_TOKENS, counts.replayed_tokens),
        ):
            metric.labels(engine_idx).inc(count)
        FINAL_ROWS.labels(engine_idx).set(counts.final_blocks * self.block_bytes)
        OPEN_ROWS.labels(engine_idx).set(counts.open_blocks * self.block_bytes)
        LOOPLM_ROWS.labels(engine_idx).set(counts.looplm_blocks * self.block_bytes)


def steps_ended() -> float:
    """Return how many steps have ended, of all engines; a step counts in one API server only, wherever it is asked."""
    metrics = get_prometheus_registry().collect() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else STEPS.collect()
    samples = (sample for metric in metrics for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name == "melt_steps_total")


def row_dtype(vllm_config: VllmConfig) -> str:
    """Return the data type of the cached rows, by vLLM's name."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return str(model.dtype).removeprefix("torch.") if cache.cache_dtype == "auto" else cache.cache_dtype


def row_bytes(vllm_config: VllmConfig, loops: int | None = None) -> int:
    """Return the bytes of one token's KV rows, over all layers of all devices.

    Args:
        loops: of a LoopLM's request, by default those of one that asks for none.
    """
    config: LoopLMConfig = vllm_config.model_config.hf_config
    bytes_per_value = STR_DTYPE_TO_TORCH_DTYPE[row_dtype(vllm_config)].itemsize
    return kv_bytes_per_token(config, bytes_per_value, loops or config.total_ut_steps)


def capacity_tokens(vllm_config: VllmConfig) -> int:
    """Return how many tokens' KV rows the cache has room for, in requests that ask for no loops."""
    cache = vllm_config.cache_config
    assert cache.num_gpu_blocks is not None
    blocks = row_bytes(vllm_config) // row_bytes(vllm_config, loops=1)  # that a block of tokens takes
    return cache.num_gpu_blocks // blocks * cache.block_size
