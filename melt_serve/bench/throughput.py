"""`melt-serve bench throughput`: MELT against LoopLM on the same requests with the same cache, turn by turn."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.options import flag
from melt_serve.bench.report import draw_spread, judged, spread
from melt_serve.bench.shapes import BLOCK_SIZE, DTYPES, MODELS, VALUE_BYTES, Checkpoint, Dtype, Model, scaled_shape
from melt_serve.terminal import columns, loop_list, positive, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from melt_serve.config import DecodeMode

HELP = "tokens a second on the same requests with the same cache"
DESCRIPTION = """\
Serve the same requests with a MELT and a LoopLM of one shape, on real engines with random weights and the same KV
bytes, in turn, and compare: once with a cache too small for all requests, once with room for all."""
EXAMPLES = """\
examples:
  melt-serve bench throughput
      8 layers, d=512, 32 requests of 128 + 128 tokens, at 4 and 8 loops; takes a quarter of an hour on 2 CPU cores
  melt-serve bench throughput --loops 4 --cache scarce --fit 2 --profile
      one setting, a scarcer cache, and where the time goes
  melt-serve bench throughput --dtype float32 --cache scarce
      on a CPU that multiplies no bfloat16
  melt-serve bench throughput --loops 2 --layers 2 --requests 8 --generated 32 --json
      smaller and quicker, and one line of JSON at the end"""

Cache = Literal["scarce", "plentiful"]

STEP_TOKENS = 2048
SCARCE_GOALS = {4: 1.5, 8: 2.5}
"""What MELT should gain by T in the default shape, where six LoopLM requests of 32 fit, or fewer."""

SHARE_OF_BOUND = 0.95
"""Of the arithmetic bound, where the cache is plentiful."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    layers: int = flag(8, "layers of the model", positive, "N")
    hidden: int = flag(512, "hidden size, a multiple of 64", positive, "D")
    loops: Sequence[int] = flag((4, 8), "depths", loop_list, "T,T")
    caches: Sequence[Cache] = flag(
        ("scarce", "plentiful"),
        "scarce: few requests of the LoopLM fit; plentiful: all do",
        words_of("scarce", "plentiful"),
        "CACHE,CACHE",
        name="--cache",
    )
    decode_mode: "DecodeMode" = flag("token", "the MELT's", choices=("token", "chunk"))
    chunk_size: int = flag(32, "the MELT's", positive, "C")
    requests: int = flag(32, "requests, all there from the start", positive, "N")
    prompt: int = flag(128, "tokens of a prompt", positive, "N")
    generated: int = flag(128, "tokens of an answer", positive, "N")
    rounds: int = flag(3, "how often both serve all requests", positive, "N")
    fit: int = flag(6, "LoopLM requests that a scarce cache holds", positive, "N")
    profile: bool = flag(False, "show where the time of one more round goes")
    dtype: Dtype = flag("bfloat16", "of weights and rows; many CPUs multiply float32 faster in batches", choices=DTYPES)
    gate_rank: int | None = flag(None, "rank of the MELT's gate, cut as by gate_rank (default: whole)", positive, "R")

    @property
    def context(self) -> int:
        """Tokens that a request has in the end."""
        return self.prompt + self.generated

    def checkpoint(self, model: Model, loops: int) -> Checkpoint:
        """Return one of the two models, at some depth."""
        shape = scaled_shape(self.layers, self.hidden)
        if model == "looplm":
            return Checkpoint(shape, model, loops, self.chunk_size)
        return Checkpoint({**shape, "kv_gate_rank": self.gate_rank}, model, loops, self.chunk_size, self.decode_mode)


@dataclass(frozen=True)
class Result:
    """One cache and depth; ratios are MELT's speed over LoopLM's in the same round.

    Attributes:
        kv_cache_memory: bytes, the same for both.
        melt_fits: whole requests that fit at once, by the engine's accounting.
        melt_tokens_per_second: generated tokens, the median round.
        bound: the ratio of the two models' multiply-adds with weights: what MELT can reach if its cache gains nothing.
        goal: for the median ratio; None if there is none for this depth.
        melt_profile: seconds of a round by part of the model; None if not asked for.
    """

    cache: Cache
    loops: int
    kv_cache_memory: int
    melt_fits: int
    looplm_fits: int
    melt_tokens_per_second: float
    looplm_tokens_per_second: float
    ratios: Sequence[float]
    bound: float
    goal: float | None
    melt_profile: dict[str, float] | None = None
    looplm_profile: dict[str, float] | None = None

    @property
    def ratio(self) -> float:
        """The median over the rounds of MELT's speed over LoopLM's."""
        return median(self.ratios)


def measure(options: Options) -> list[Result]:
    """Serve every round with both engines, for every depth and cache.

    Raises:
        BenchError: the options fit no engine, or one of them failed; the message names it.
    """
    refuse(options.hidden, options.chunk_size, options.decode_mode)
    if options.gate_rank is not None and options.gate_rank > options.hidden:
        raise BenchError(f"--gate-rank={options.gate_rank} is more than --hidden={options.hidden}")
    settings = [(cache, loops) for loops in options.loops for cache in options.caches]
    results = []
    with tqdm(total=len(settings) * options.rounds, unit="round", disable=None) as progress:
        for cache, loops in settings:
            progress.set_description(f"T={loops}, {cache} cache")
            with both_engines(options, cache, loops) as engines:
                fits = {model: engine.ask("requests_that_fit") for model, engine in engines.items()}
                seconds: dict[Model, list[float]] = {model: [] for model in MODELS}
                for number in range(options.rounds):
                    # Who goes first changes, so that a machine that slows down favours nobody.
                    for model in MODELS if number % 2 else reversed(MODELS):
                        seconds[model].append(
                            engines[model].ask("generate", **generate_arguments(options, seed=2 + number))
                        )
                    progress.update()
                result = result_of(options, cache, loops, fits, seconds)
                if options.profile:
                    arguments = generate_arguments(options, seed=0)
                    melt, looplm = (engines[model].ask("profile", **arguments) for model in ("melt", "looplm"))
                    result = replace(result, melt_profile=melt, looplm_profile=looplm)
            results.append(result)
    return results


def refuse(hidden: int, chunk_size: int, decode_mode: "DecodeMode") -> None:
    """Refuse before the engines start what they would refuse, or could not be compared at.

    Raises:
        BenchError: the option, and what it must be.
    """
    if hidden % 64:
        raise BenchError(f"--hidden={hidden} must be a multiple of 64, the size of a head")
    if chunk_size > STEP_TOKENS:
        raise BenchError(f"--chunk-size={chunk_size} is more than the {STEP_TOKENS} tokens of a step")
    if decode_mode == "chunk" and chunk_size % BLOCK_SIZE:
        raise BenchError(f"--chunk-size={chunk_size} must be a multiple of {BLOCK_SIZE}, the KV block, in chunk mode")


@contextmanager
def both_engines(options: Options, cache: Cache, loops: int) -> Iterator[dict[Model, Engine]]:
    """Start both engines and warm them up. Between questions an engine sleeps."""
    arguments: dict[str, object] = {
        "kv_cache_memory_bytes": cache_bytes(options, cache, loops),
        "block_size": BLOCK_SIZE,
        "max_model_len": options.context,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": options.requests,
        "dtype": options.dtype,
    }
    with ExitStack() as stack:
        engines = {
            model: stack.enter_context(Engine(f"{model}, T={loops}, {cache}", checkpoint, arguments))
            for model in MODELS
            for checkpoint in [options.checkpoint(model, loops)]
        }
        for engine in engines.values():
            engine.answer()
            engine.ask("generate", **{**generate_arguments(options, seed=1), "generated": 2})
        yield engines


def generate_arguments(options: Options, seed: int) -> dict[str, int]:
    """Return a round's requests, as the worker's `generate` takes them.

    Every round has other prompts: none finds its prefix in the cache.
    """
    return {"requests": options.requests, "prompt": options.prompt, "generated": options.generated, "seed": seed}


def cache_bytes(options: Options, cache: Cache, loops: int) -> int:
    """Return the bytes of either engine's cache: for a few requests of the LoopLM, or for all of them."""
    requests = min(options.fit, options.requests) if cache == "scarce" else options.requests
    block = BLOCK_SIZE * options.checkpoint("looplm", loops).kv_bytes_per_token(VALUE_BYTES[options.dtype])
    # And one block for every loop: vLLM never uses the first block of its pool.
    return (requests * math.ceil(options.context / BLOCK_SIZE) + 1) * block


def result_of(
    options: Options, cache: Cache, loops: int, fits: dict[Model, float], seconds: dict[Model, list[float]]
) -> Result:
    """Gather what was measured with one cache at one depth, and its goal.

    Args:
        fits: requests that each engine's cache holds.
        seconds: of each engine's rounds.
    """
    tokens = options.requests * options.generated
    bound = work(options, "looplm", loops) / work(options, "melt", loops)
    return Result(
        cache=cache,
        loops=loops,
        kv_cache_memory=cache_bytes(options, cache, loops),
        melt_fits=int(fits["melt"]),
        looplm_fits=int(fits["looplm"]),
        melt_tokens_per_second=tokens / median(seconds["melt"]),
        looplm_tokens_per_second=tokens / median(seconds["looplm"]),
        ratios=[looplm / melt for melt, looplm in zip(seconds["melt"], seconds["looplm"], strict=True)],
        bound=bound,
        goal=SHARE_OF_BOUND * bound if cache == "plentiful" else SCARCE_GOALS.get(loops),
    )


def work(options: Options, model: Model, loops: int) -> int:
    """Count the multiply-adds with weights for one request: what attention adds is the same for both and left out.

    Loop 1 of a MELT has no gate to compute (h_1 = n_1), and the head runs once a generated token.
    """
    from melt_serve.config import weight_shapes

    shapes = {name: math.prod(size) for name, size in weight_shapes(options.checkpoint(model, loops).config)}
    layers = sum(count for name, count in shapes.items() if name.endswith(("_proj.weight", "_down.weight")))
    gates = sum(count for name, count in shapes.items() if ".kv_gate." in name and name.endswith(".weight"))
    return options.context * (loops * layers - gates) + options.generated * shapes["lm_head.weight"]


def table(results: Sequence[Result]) -> str:
    """Show the results in columns, and their profiles if there are any; MiB are 2^20 bytes."""
    lines: list[tuple[str, ...]] = [
        ("cache", "T", "KV cache", "fit: MELT", "LoopLM", "MELT", "LoopLM", "ratio", "min", "max", "bound", "goal")
    ]
    for result in results:
        lines.append(
            (
                result.cache,
                str(result.loops),
                f"{result.kv_cache_memory / 2**20:.0f} MiB",
                str(result.melt_fits),
                str(result.looplm_fits),
                f"{result.melt_tokens_per_second:.1f} tok/s",
                f"{result.looplm_tokens_per_second:.1f} tok/s",
                *spread(result.ratios),
                f"{result.bound:.2f}",
                judged(result.goal, result.ratio),
            )
        )
    return "\n\n".join([columns(lines), *(profile_table(result) for result in results if result.melt_profile)])


def profile_table(result: Result) -> str:
    """Show where the time of one more round went, in seconds."""
    melt, looplm = result.melt_profile, result.looplm_profile
    assert melt is not None and looplm is not None
    lines = [(f"{result.cache} cache, T={result.loops}", "MELT", "LoopLM")]
    for part in sorted(melt, key=melt.__getitem__, reverse=True):
        lines.append((part, f"{melt[part]:.2f} s", f"{looplm.get(part, 0):.2f} s"))
    lines.append(("sum", f"{sum(melt.values()):.2f} s", f"{sum(looplm.values()):.2f} s"))
    return columns(lines)


def figure(results: Sequence[Result]) -> "Figure":
    """Draw median ratios with their spread, over the loops; a line for each cache."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    axes.set(title="tokens a second, MELT / LoopLM, same requests and KV bytes", xlabel="loops T")
    for cache in dict.fromkeys(result.cache for result in results):
        points = [result for result in results if result.cache == cache]
        draw_spread(axes, [each.loops for each in points], [each.ratios for each in points], label=f"{cache} cache")
    bounds = {result.loops: result.bound for result in results}
    axes.plot(list(bounds), list(bounds.values()), linestyle=":", marker=".", label="by arithmetic alone")
    axes.set_xticks(list(bounds))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn
