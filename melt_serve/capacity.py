"""`melt-serve plan`: what a model's parts take of a device's memory, and how many requests fit. Arithmetic only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from huggingface_hub.errors import StrictDataclassError

from melt_serve.checkpoint_config import load_config
from melt_serve.checkpoint_path import CONFIG, CheckpointError, located
from melt_serve.config import (
    DECODE_MODES,
    LoopLMConfig,
    MeltConfig,
    gate_width,
    kv_bytes_per_token,
    shape_facts,
    weight_shapes,
)
from melt_serve.terminal import columns

GB = 10**9
KV_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}
OURO = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "total_ut_steps": 4,
}
SHAPES = {
    "ouro-1.4b": {**OURO, "num_hidden_layers": 24},
    "ouro-2.6b": {**OURO, "num_hidden_layers": 48},
}
"""Published shapes (Ouro, arXiv 2510.25741)."""


UTILIZATION = 0.92
"""vLLM's `--gpu-memory-utilization` by default: the share of the device's memory that it takes, for everything."""
CONTEXT_AND_GRAPHS = 3 * GB // 2
"""Our estimate, not measured: the driver's context, communication and CUDA graphs."""
SAMPLED = 256
"""Requests that vLLM samples for in one step by default; a device of 70 GiB or more has 1024."""


class PlanError(ValueError):
    """There is no such shape or load to plan with."""


@dataclass(frozen=True)
class Load:
    """What is to be served.

    Attributes:
        loops: T.
        context: tokens a request holds, prompt and answer.
        requests: how many run at once.
        step_tokens: tokens in one step of the engine (`--max-num-batched-tokens`).
        kv_dtype: of the rows, a key of `KV_BYTES`.
        weight_bytes: bytes a weight, and a value of the transient state.
    """

    loops: int
    context: int
    requests: int
    step_tokens: int
    kv_dtype: str
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """Bytes on the device, part by part.

    Attributes:
        kv_per_token: final rows of one token, over all layers.
        open_chunk: `chunk` mode: rows per loop of one request's open chunk.
        kv: rows of all requests.
        transient: the state h of one step's tokens, over all layers.
        working: an estimate of what a server takes beside all that, see `working_memory`; 0 if not asked.
        fits: requests that fit in the share of the device's memory that vLLM takes; None if not asked.
    """

    model: str
    weights: int
    kv_per_token: int
    open_chunk: int
    kv: int
    transient: int
    working: int = 0
    fits: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return self.weights + self.kv + self.transient


def plan(
    name: str, config: LoopLMConfig, load: Load, device_bytes: int | None = None, utilization: float = UTILIZATION
) -> Plan:
    """Add up one model's parts. The loops are the load's, not the config's.

    Args:
        device_bytes: of the device, to count the requests that fit.
        utilization: the share of them that vLLM may take.
    """
    row = kv_bytes_per_token(config, KV_BYTES[load.kv_dtype], load.loops)
    open_chunk = transient = 0
    if isinstance(config, MeltConfig):
        if config.decode_mode == "chunk":
            open_chunk = (load.loops - 1) * config.chunk_size * row
        transient = config.num_hidden_layers * load.step_tokens * config.hidden_size * load.weight_bytes
    weights = load.weight_bytes * sum(math.prod(shape) for _, shape in weight_shapes(config))
    request = load.context * row + open_chunk
    planned = Plan(name, weights, row, open_chunk, load.requests * request, transient)
    if device_bytes is None:
        return planned
    working = working_memory(config, load)
    left = int(device_bytes * utilization) - weights - transient - working
    return replace(planned, working=working, fits=max(0, left) // request)


def working_memory(config: LoopLMConfig, load: Load) -> int:
    """Estimate what a server takes for a step's activations, for logits, and for the device's own context and graphs.

    At most, by our count, a step holds the MLP's three widths and six of the hidden size for each token, and for each
    request that it samples three tables of float32 over the vocabulary. A MELT also holds U_z h of all layers.
    """
    widths = 3 * config.intermediate_size + 6 * config.hidden_size
    if isinstance(config, MeltConfig):
        widths += config.num_hidden_layers * gate_width(config)
    logits = 3 * 4 * SAMPLED * config.vocab_size
    return load.step_tokens * widths * load.weight_bytes + logits + CONTEXT_AND_GRAPHS


def compare(
    config: LoopLMConfig,
    load: Load,
    chunk_size: int,
    device_bytes: int | None = None,
    utilization: float = UTILIZATION,
) -> list[Plan]:
    """Plan the shape as a MELT in both decode modes, as a LoopLM, and as a plain transformer (one loop).

    Raises:
        PlanError: loops or chunk size are none that a MELT can have.
    """
    facts = shape_facts(config)
    looplm = LoopLMConfig(**facts)
    loops = {"total_ut_steps": load.loops, "max_loops": load.loops}
    plans = []
    for mode in DECODE_MODES:
        try:
            melt = MeltConfig(**{**facts, **loops, "chunk_size": chunk_size, "decode_mode": mode})
        except StrictDataclassError as error:
            raise PlanError(f"there is no such MELT: {error.__cause__ or error}") from error
        plans.append(plan(f"MELT, {mode} mode", melt, load, device_bytes, utilization))
    plans.append(plan("LoopLM", looplm, load, device_bytes, utilization))
    plans.append(plan("plain transformer", looplm, replace(load, loops=1), device_bytes, utilization))
    return plans


def shape_of(model: str) -> LoopLMConfig:
    """Return the config of a published shape, of a checkpoint's folder or config.json, or of one on the hub.

    Raises:
        PlanError: neither of them, or a config of another kind.
    """
    if model in SHAPES:
        return LoopLMConfig(**SHAPES[model])
    try:
        return load_config(located(model, CONFIG))
    except CheckpointError as error:
        raise PlanError(f"{error}; published shapes are {', '.join(SHAPES)}") from None


def table(plans: Sequence[Plan]) -> str:
    """Show the plans in columns; GB are 10^9 bytes."""
    head = ("model", "KV a token", "open chunk", "KV", "weights", "transient", "sum")
    lines: list[tuple[str, ...]] = [(*head, "working", "requests that fit") if plans[0].fits is not None else head]
    for each in plans:
        parts = [f"{part / GB:.2f} GB" for part in (each.kv, each.weights, each.transient, each.total)]
        line = (each.model, f"{each.kv_per_token:,} B", f"{each.open_chunk:,} B", *parts)
        lines.append((*line, f"{each.working / GB:.2f} GB", f"{each.fits:,}") if each.fits is not None else line)
    return columns(lines)
