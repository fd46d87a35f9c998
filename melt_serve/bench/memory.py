"""`melt-serve bench memory`: what a token, a request and a process cost, read from running engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.shapes import BLOCK_SIZE, Checkpoint, Model, shape
from melt_serve.config import DECODE_MODES, DecodeMode, kv_bytes_per_token
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULTS = {"demo": (64 << 20, 2048), "melt-1.6b": (2 << 30, 256)}
"""A shape's size of the cache in bytes, and its context: one request of a LoopLM with 32 loops fits."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shape: `demo` or `melt-1.6b`.
        loops: every T.
        models: of `melt` and `looplm`.
        kv_dtypes: vLLM's names; `auto` is bfloat16 here.
        kv_memory: bytes of KV cache, the same for every engine; None for the shape's default.
        chunk_size: C.
        context: the most tokens a request may have; None for the shape's default.
        step_tokens: the most tokens a step may have.
    """

    shape: str
    loops: Sequence[int]
    models: Sequence[Model]
    kv_dtypes: Sequence[str]
    kv_memory: int | None
    chunk_size: int
    context: int | None
    step_tokens: int


@dataclass(frozen=True)
class Row:
    """One engine, in bytes and tokens, as the engine itself has them.

    Attributes:
        decode_mode: None for a LoopLM.
        open_chunk_bytes: rows of loops 1..T-1 that a request keeps of its open chunk, at most.
        token_capacity: tokens the cache holds, in requests as long as the context.
        max_concurrency: such requests at once.
        peak_bytes: the most the whole process has had in memory, after a full step.
        transient_bytes: the state h of a full step, which goes with the step.
    """

    model: Model
    decode_mode: DecodeMode | None
    loops: int
    kv_dtype: str
    kv_bytes_per_token: int
    open_chunk_bytes: int
    token_capacity: int
    max_concurrency: float
    peak_bytes: int
    transient_bytes: int


def measure(options: Options) -> list[Row]:
    """Start every engine in turn, in a process of its own, and read its memory.

    Raises:
        BenchError: the options fit no engine, or one of them failed; the message names it.
    """
    kv_memory, context = DEFAULTS[options.shape]
    kv_memory, context = options.kv_memory or kv_memory, options.context or context
    if not options.chunk_size <= options.step_tokens < context:
        raise BenchError(
            f"--step-tokens={options.step_tokens} must be at least --chunk-size={options.chunk_size} "
            f"and below --context={context}"
        )
    checkpoints = [
        Checkpoint(shape(options.shape), model, loops, options.chunk_size, mode)
        for model in options.models
        for mode in (DECODE_MODES if model == "melt" else (None,))
        for loops in options.loops
    ]
    engines = [(checkpoint, kv_dtype) for checkpoint in checkpoints for kv_dtype in options.kv_dtypes]
    for checkpoint, kv_dtype in engines:
        refuse_small_cache(checkpoint, kv_dtype, kv_memory, context)
    arguments: dict[str, object] = {
        "kv_cache_memory_bytes": kv_memory,
        "block_size": BLOCK_SIZE,
        "max_model_len": context,
        "max_num_batched_tokens": options.step_tokens,
        "max_num_seqs": options.step_tokens,
    }
    rows = []
    progress = tqdm(engines, unit="engine", disable=None)
    for checkpoint, kv_dtype in progress:
        name = engine_name(checkpoint, kv_dtype)
        progress.set_description(name)
        with Engine(name, checkpoint, {**arguments, "kv_cache_dtype": kv_dtype}) as engine:
            engine.answer()
            read = engine.ask("memory", prompt=options.step_tokens)
        rows.append(Row(checkpoint.model, checkpoint.decode_mode, checkpoint.loops, kv_dtype, **read))
    return rows


def engine_name(checkpoint: Checkpoint, kv_dtype: str) -> str:
    """What errors and the progress bar call an engine."""
    return f"{checkpoint}, T={checkpoint.loops}, KV {kv_dtype}"


def refuse_small_cache(checkpoint: Checkpoint, kv_dtype: str, kv_memory: int, context: int) -> None:
    """Say before the first engine starts what vLLM would say minutes later: not one request fits."""
    tokens = ceil(context / BLOCK_SIZE) * BLOCK_SIZE
    if checkpoint.decode_mode == "chunk":
        tokens += (checkpoint.loops - 1) * ceil(checkpoint.chunk_size / BLOCK_SIZE) * BLOCK_SIZE
    needed = tokens * kv_bytes_per_token(checkpoint.config, 1 if kv_dtype == "fp8" else 2)
    if needed > kv_memory:
        raise BenchError(
            f"{engine_name(checkpoint, kv_dtype)}: one request of --context={context} tokens takes {needed} bytes, "
            f"but --kv-cache-memory={kv_memory}; raise it, or lower --context or --loops"
        )


def table(rows: Sequence[Row]) -> str:
    """The rows in columns; MB are 10^6 bytes."""
    lines: list[tuple[str, ...]] = [
        ("model", "T", "KV dtype", "KV a token", "open chunk", "tokens that fit", "requests", "state of a step", "peak")
    ]
    for row in rows:
        lines.append(
            (
                called(row),
                str(row.loops),
                row.kv_dtype,
                f"{row.kv_bytes_per_token:,} B",
                f"{row.open_chunk_bytes:,} B",
                f"{row.token_capacity:,}",
                f"{row.max_concurrency:.1f}",
                f"{row.transient_bytes:,} B",
                f"{row.peak_bytes / 1e6:,.0f} MB",
            )
        )
    return columns(lines)


def called(row: Row) -> str:
    """The model in words."""
    return f"MELT, {row.decode_mode} mode" if row.model == "melt" else "LoopLM"


def figure(rows: Sequence[Row]) -> "Figure":
    """KV bytes a token and requests that fit, over the loops; a line for each model and dtype."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    cost, fitting = drawn.subplots(1, 2)
    loops = sorted({row.loops for row in rows})
    for axes, title in ((cost, "KV cache a token, bytes"), (fitting, "requests that fit in the same memory")):
        axes.set(title=title, xlabel="loops T")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(loops, [str(each) for each in loops])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(called(row) + ("" if row.kv_dtype == "auto" else f", {row.kv_dtype}"), []).append(row)
    for number, (label, points) in enumerate(series.items()):
        style = {"label": label, "marker": "osd^v"[number % 5], "linestyle": ("-", "--", ":")[number % 3]}
        points.sort(key=lambda row: row.loops)
        cost.plot([row.loops for row in points], [row.kv_bytes_per_token for row in points], **style)
        fitting.plot([row.loops for row in points], [row.max_concurrency for row in points], **style)
    cost.legend()
    return drawn
