"""`melt-serve bench memory`: what a token, a request and a process cost, read from running engines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.options import flag
from melt_serve.bench.report import set_loop_axis
from melt_serve.bench.shapes import BLOCK_SIZE, MODELS, Checkpoint, Model, shape
from melt_serve.terminal import byte_count, columns, loop_list, positive, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from melt_serve.config import DecodeMode

HELP = "what a token, a request and a process cost"
DESCRIPTION = """\
Start a real engine for each line, with random weights and the same KV bytes, and read from it what a token and a
request cost, how many fit, and what the process took at its peak. Every engine runs in a process of its own."""
EXAMPLES = """\
examples:
  melt-serve bench memory
      the bundled checkpoint's shape at 1 to 32 loops, as a MELT in both decode modes and as a LoopLM
  melt-serve bench memory --shape melt-1.6b --loops 1,4 --kv-dtype auto,fp8
      Ouro-1.4B's true shape, also with FP8 rows; takes 8 GB of memory
  melt-serve bench memory --loops 1,2,4,8 --models melt --plot memory.png --json
      MELT alone, with a plot, and one line of JSON at the end"""

DEFAULTS = {"demo": (64 << 20, 2048), "melt-1.6b": (2 << 30, 256)}
"""A shape's size of the cache in bytes, and its context: one request of a LoopLM with 32 loops fits."""


@dataclass(frozen=True)
class Options:
    """What to measure; `kv_memory` and `context` are None for the shape's own, see `DEFAULTS`."""

    shape: str = flag("demo", "sizes of the model", choices=("demo", "melt-1.6b"))
    loops: Sequence[int] = flag((1, 2, 4, 8, 16, 32), "depths", loop_list, "T,T")
    models: Sequence[Model] = flag(MODELS, "melt, looplm or both", words_of(*MODELS), "MODEL,MODEL")
    kv_dtypes: Sequence[str] = flag(
        ("auto",),
        "of the rows: auto (bfloat16), fp8 or both",
        words_of("auto", "fp8"),
        "DTYPE,DTYPE",
        name="--kv-dtype",
    )
    kv_memory: int | None = flag(
        None,
        "KV cache of every engine, such as 8M or 2G (default: 64M; 2G for melt-1.6b)",
        byte_count,
        "BYTES",
        name="--kv-cache-memory",
    )
    chunk_size: int = flag(64, "the MELT's", positive, "C")
    context: int | None = flag(None, "tokens a request may have (default: 2048; 256 for melt-1.6b)", positive, "N")
    step_tokens: int = flag(64, "tokens a step may have", positive, "N")


@dataclass(frozen=True)
class Result:
    """One engine, in bytes and tokens, as the engine itself has them.

    Attributes:
        decode_mode: None for a LoopLM.
        kv_bytes_per_token: of a request that runs the engine's loops.
        kv_bytes_by_loops: the same of requests that run fewer.
        open_chunk_bytes: rows of loops 1..T-1 that a request keeps of its open chunk, at most.
        token_capacity: tokens the cache holds, in requests as long as the context.
        max_concurrency: such requests at once.
        peak_bytes: the most the whole process has had in memory, after a full step.
        transient_bytes: the state h of a full step, which goes with the step.
    """

    model: Model
    decode_mode: "DecodeMode | None"
    loops: int
    kv_dtype: str
    kv_bytes_per_token: int
    kv_bytes_by_loops: Mapping[str, int]
    open_chunk_bytes: int
    token_capacity: int
    max_concurrency: float
    peak_bytes: int
    transient_bytes: int


def measure(options: Options) -> list[Result]:
    """Start every engine in turn, in a process of its own, and read its memory.

    Raises:
        BenchError: the options fit no engine, or one of them failed; the message names it.
    """
    from melt_serve.config import DECODE_MODES

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
    results = []
    progress = tqdm(engines, unit="engine", disable=None)
    for checkpoint, kv_dtype in progress:
        name = engine_name(checkpoint, kv_dtype)
        progress.set_description(name)
        with Engine(name, checkpoint, {**arguments, "kv_cache_dtype": kv_dtype}) as engine:
            engine.answer()
            read = engine.ask("memory", prompt=options.step_tokens)
        results.append(Result(checkpoint.model, checkpoint.decode_mode, checkpoint.loops, kv_dtype, **read))
    return results


def engine_name(checkpoint: Checkpoint, kv_dtype: str) -> str:
    """Return the name of an engine in errors and in the progress bar."""
    return f"{checkpoint}, T={checkpoint.loops}, KV {kv_dtype}"


def refuse_small_cache(checkpoint: Checkpoint, kv_dtype: str, kv_memory: int, context: int) -> None:
    """Refuse before the first engine starts what vLLM would refuse minutes later: not one request fits.

    Raises:
        BenchError: what a request takes, and how much there is.
    """
    tokens = ceil(context / BLOCK_SIZE) * BLOCK_SIZE
    if checkpoint.decode_mode == "chunk":
        tokens += (checkpoint.loops - 1) * ceil(checkpoint.chunk_size / BLOCK_SIZE) * BLOCK_SIZE
    needed = tokens * checkpoint.kv_bytes_per_token(1 if kv_dtype == "fp8" else 2)
    if needed > kv_memory:
        raise BenchError(
            f"{engine_name(checkpoint, kv_dtype)}: one request of --context={context} tokens takes {needed} bytes, "
            f"but --kv-cache-memory={kv_memory}; raise it, or lower --context or --loops"
        )


def table(results: Sequence[Result]) -> str:
    """Show the results in columns; MB are 10^6 bytes."""
    lines: list[tuple[str, ...]] = [
        (
            "model",
            "T",
            "KV dtype",
            "KV a token",
            "at one loop",
            "open chunk",
            "tokens that fit",
            "requests",
            "state",
            "peak",
        )
    ]
    for result in results:
        lines.append(
            (
                model_name(result),
                str(result.loops),
                result.kv_dtype,
                f"{result.kv_bytes_per_token:,} B",
                f"{result.kv_bytes_by_loops['1']:,} B",
                f"{result.open_chunk_bytes:,} B",
                f"{result.token_capacity:,}",
                f"{result.max_concurrency:.1f}",
                f"{result.transient_bytes:,} B",
                f"{result.peak_bytes / 1e6:,.0f} MB",
            )
        )
    return columns(lines)


def model_name(result: Result) -> str:
    """Return the model in words, with its decode mode."""
    return f"MELT, {result.decode_mode} mode" if result.model == "melt" else "LoopLM"


def figure(results: Sequence[Result]) -> "Figure":
    """Draw KV bytes a token and requests that fit, over the loops; a line for each model and dtype."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    cost, fitting = drawn.subplots(1, 2)
    loops = sorted({result.loops for result in results})
    for axes, title in ((cost, "KV cache a token, bytes"), (fitting, "requests that fit in the same memory")):
        set_loop_axis(axes, title, loops)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    series: dict[str, list[Result]] = {}
    for result in results:
        label = model_name(result) + ("" if result.kv_dtype == "auto" else f", {result.kv_dtype}")
        series.setdefault(label, []).append(result)
    for number, (label, points) in enumerate(series.items()):
        style = {"label": label, "marker": "osd^v"[number % 5], "linestyle": ("-", "--", ":")[number % 3]}
        points.sort(key=lambda result: result.loops)
        cost.plot([result.loops for result in points], [result.kv_bytes_per_token for result in points], **style)
        fitting.plot([result.loops for result in points], [result.max_concurrency for result in points], **style)
    cost.legend()
    return drawn
