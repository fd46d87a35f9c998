"""`melt-serve bench throughput`: MELT against LoopLM on the same requests with the same cache, turn by turn."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.shapes import BLOCK_SIZE, MODELS, Checkpoint, Model, scaled_shape
from melt_serve.config import DecodeMode, kv_bytes_per_token, weight_shapes
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cache = Literal["scarce", "plentiful"]

STEP_TOKENS = 2048
SCARCE_GOALS = {4: 1.5, 8: 2.5}
"""What MELT should gain by T in the default shape, where six LoopLM requests of 32 fit, or fewer."""

SHARE_OF_BOUND = 0.95
"""Of the arithmetic bound, where the cache is plentiful."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layers: N.
        hidden: d, a multiple of 64.
        loops: every T.
        caches: of `scarce` and `plentiful`.
        decode_mode: the MELT's.
        chunk_size: C.
        requests: all there from the start.
        prompt: tokens each.
        generated: tokens each.
        rounds: how often both engines serve them.
        fit: requests of the LoopLM that a scarce cache holds.
        profile: one more round, with a clock around every part of the model.
        gate_rank: of the MELT's W_z and U_z; None for whole ones.
    """

    layers: int
    hidden: int
    loops: Sequence[int]
    caches: Sequence[Cache]
    decode_mode: DecodeMode
    chunk_size: int
    requests: int
    prompt: int
    generated: int
    rounds: int
    fit: int = 6
    profile: bool = False
    gate_rank: int | None = None

    @property
    def context(self) -> int:
        """Tokens a request has in the end."""
        return self.prompt + self.generated

    def checkpoint(self, model: Model, loops: int) -> Checkpoint:
        """One of the two, at some depth."""
        shape = scaled_shape(self.layers, self.hidden)
        if model == "looplm":
            return Checkpoint(shape, model, loops, self.chunk_size)
        return Checkpoint({**shape, "kv_gate_rank": self.gate_rank}, model, loops, self.chunk_size, self.decode_mode)


@dataclass(frozen=True)
class Row:
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
        """The median round's."""
        return median(self.ratios)


def measure(options: Options) -> list[Row]:
    """Serve every round with both engines, for every depth and cache.

    Raises:
        BenchError: the options fit no engine, or one of them failed; the message names it.
    """
    refuse(options.hidden, options.chunk_size, options.decode_mode)
    if options.gate_rank is not None and options.gate_rank > options.hidden:
        raise BenchError(f"--gate-rank={options.gate_rank} is more than --hidden={options.hidden}")
    settings = [(cache, loops) for loops in options.loops for cache in options.caches]
    rows = []
    with tqdm(total=len(settings) * options.rounds, unit="round", disable=None) as progress:
        for cache, loops in settings:
            progress.set_description(f"T={loops}, {cache} cache")
            with both_engines(options, cache, loops) as engines:
                fits = {model: engine.ask("requests_that_fit") for model, engine in engines.items()}
                seconds: dict[Model, list[float]] = {model: [] for model in MODELS}
                for number in range(options.rounds):
                    # Who goes first changes, so that a machine that slows down favours nobody.
                    for model in MODELS if number % 2 else reversed(MODELS):
                        seconds[model].append(engines[model].ask("generate", **load(options, seed=2 + number)))
                    progress.update()
                measured = row(options, cache, loops, fits, seconds)
                if options.profile:
                    profiles = {
                        model: engine.ask("profile", **load(options, seed=0)) for model, engine in engines.items()
                    }
                    measured = replace(measured, melt_profile=profiles["melt"], looplm_profile=profiles["looplm"])
            rows.append(measured)
    return rows


def refuse(hidden: int, chunk_size: int, decode_mode: DecodeMode) -> None:
    """Say before the engines start what they would refuse, or could not be compared at.

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
    """Both engines at once, started and warm. Between questions an engine sleeps."""
    arguments: dict[str, object] = {
        "kv_cache_memory_bytes": cache_bytes(options, cache, loops),
        "block_size": BLOCK_SIZE,
        "max_model_len": options.context,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": options.requests,
    }
    with ExitStack() as stack:
        engines = {
            model: stack.enter_context(Engine(f"{model}, T={loops}, {cache}", checkpoint, arguments))
            for model in MODELS
            for checkpoint in [options.checkpoint(model, loops)]
        }
        for engine in engines.values():
            engine.answer()
            engine.ask("generate", **{**load(options, seed=1), "generated": 2})
        yield engines


def load(options: Options, seed: int) -> dict[str, int]:
    """One round's requests. Every round has other prompts: none finds its prefix in the cache."""
    return {"requests": options.requests, "prompt": options.prompt, "generated": options.generated, "seed": seed}


def cache_bytes(options: Options, cache: Cache, loops: int) -> int:
    """Bytes of the cache for both: a few requests of the LoopLM, or more than all of them."""
    requests = min(options.fit, options.requests) if cache == "scarce" else options.requests
    block = BLOCK_SIZE * kv_bytes_per_token(options.checkpoint("looplm", loops).config, bytes_per_value=2)
    # And one block for every loop: vLLM never uses the first block of its pool.
    return (requests * math.ceil(options.context / BLOCK_SIZE) + 1) * block


def row(options: Options, cache: Cache, loops: int, fits: dict[Model, float], seconds: dict[Model, list[float]]) -> Row:
    """What was measured, and what is asked of it."""
    tokens = options.requests * options.generated
    bound = work(options, "looplm", loops) / work(options, "melt", loops)
    return Row(
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
    """Multiply-adds with weights for one request: what attention adds is the same for both and left out.

    Loop 1 of a MELT has no gate to compute (h_1 = n_1), and the head runs once a generated token.
    """
    shapes = {name: math.prod(size) for name, size in weight_shapes(options.checkpoint(model, loops).config)}
    layers = sum(count for name, count in shapes.items() if name.endswith(("_proj.weight", "_down.weight")))
    gates = sum(count for name, count in shapes.items() if ".kv_gate." in name and name.endswith(".weight"))
    return options.context * (loops * layers - gates) + options.generated * shapes["lm_head.weight"]


def table(rows: Sequence[Row]) -> str:
    """The rows in columns; MiB are 2^20 bytes."""
    lines: list[tuple[str, ...]] = [
        ("cache", "T", "KV cache", "fit: MELT", "LoopLM", "MELT", "LoopLM", "ratio", "min", "max", "bound", "goal")
    ]
    for row in rows:
        lines.append(
            (
                row.cache,
                str(row.loops),
                f"{row.kv_cache_memory / 2**20:.0f} MiB",
                str(row.melt_fits),
                str(row.looplm_fits),
                f"{row.melt_tokens_per_second:.1f} tok/s",
                f"{row.looplm_tokens_per_second:.1f} tok/s",
                f"{row.ratio:.2f}x",
                f"{min(row.ratios):.2f}",
                f"{max(row.ratios):.2f}",
                f"{row.bound:.2f}",
                "-" if row.goal is None else f"{row.goal:.2f} {'reached' if row.ratio >= row.goal else 'missed'}",
            )
        )
    return columns(lines)


def profile_table(row: Row) -> str:
    """Where the time of one more round went, in seconds."""
    assert row.melt_profile is not None and row.looplm_profile is not None
    lines: list[tuple[str, ...]] = [(f"{row.cache} cache, T={row.loops}", "MELT", "LoopLM")]
    parts = sorted(row.melt_profile, key=row.melt_profile.__getitem__, reverse=True)
    for part in parts:
        lines.append((part, f"{row.melt_profile[part]:.2f} s", f"{row.looplm_profile.get(part, 0):.2f} s"))
    lines.append(("sum", f"{sum(row.melt_profile.values()):.2f} s", f"{sum(row.looplm_profile.values()):.2f} s"))
    return columns(lines)


def figure(rows: Sequence[Row]) -> "Figure":
    """Median ratios with their spread, over the loops; a line for each cache."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    axes.set(title="tokens a second, MELT / LoopLM, same requests and KV bytes", xlabel="loops T")
    for cache in dict.fromkeys(row.cache for row in rows):
        points = [row for row in rows if row.cache == cache]
        loops, ratios = [row.loops for row in points], [row.ratio for row in points]
        below = [row.ratio - min(row.ratios) for row in points]
        above = [max(row.ratios) - row.ratio for row in points]
        axes.errorbar(loops, ratios, yerr=(below, above), marker="o", capsize=4, label=f"{cache} cache")
    bounds = {row.loops: row.bound for row in rows}
    axes.plot(list(bounds), list(bounds.values()), linestyle=":", marker=".", label="by arithmetic alone")
    axes.set_xticks(list(bounds))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn
