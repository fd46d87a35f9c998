"""`melt-serve bench depth`: one MELT engine, asked for more or fewer loops: time, rows, and right answers."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.shapes import BLOCK_SIZE, Checkpoint, scaled_shape
from melt_serve.bench.throughput import STEP_TOKENS, refuse
from melt_serve.bundled import MELT
from melt_serve.config import DecodeMode, MeltConfig, kv_bytes_per_token
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USUAL_LOOPS = 4
"""Ouro's depth: times are relative to it, or to the measured depth nearest to it."""

TIME_GOALS = {1: 0.35}
"""The most time a depth should take of T=4's."""

MIX_GOALS = {(1, 8): 1.4}
"""What the throughput should gain where half of the requests think this much less than the others."""

ACCURACY_CACHE = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 128}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layers: N.
        hidden: d, a multiple of 64.
        loops: every T; the engine is built for the largest.
        mix: two depths, the smaller first; None for 1 and 8, or as deep as the engine goes.
        decode_mode: of all MELTs here.
        chunk_size: C of the one with random weights.
        requests: all there from the start.
        prompt: tokens each.
        generated: tokens each.
        rounds: how often they are served at each depth.
        questions: asked of the bundled checkpoint at each depth; 0 for none.
    """

    layers: int
    hidden: int
    loops: Sequence[int]
    mix: tuple[int, int] | None
    decode_mode: DecodeMode
    chunk_size: int
    requests: int
    prompt: int
    generated: int
    rounds: int
    questions: int = 0

    @property
    def depths(self) -> list[int]:
        """From 1 loop up, each once."""
        return sorted(set(self.loops))

    @property
    def mixed(self) -> tuple[int, int] | None:
        """The two depths of the mix; None if there is only one."""
        default = (1, min(8, max(self.loops)))
        return self.mix or (default if default[1] > 1 else None)

    @property
    def base(self) -> int:
        """The depth whose time is 1."""
        return min(self.depths, key=lambda loops: abs(loops - USUAL_LOOPS))

    @property
    def checkpoint(self) -> Checkpoint:
        """The MELT with random weights, for up to the most loops."""
        return Checkpoint(
            scaled_shape(self.layers, self.hidden), "melt", max(self.loops), self.chunk_size, self.decode_mode
        )


@dataclass(frozen=True)
class Row:
    """One depth.

    Attributes:
        rates: generated tokens a second, in each round.
        relative_times: its time over that of the base depth in the same round.
        time_goal: the most that their median should be; None if there is none for this depth.
        latency_seconds: between two tokens of a request served alone, the median round.
        kv_bytes_per_token: final rows, as the pool had given blocks away for them.
        open_chunk_bytes: rows of loops 1..T-1 that a request held of its open chunk, at most.
        accuracy: share of right answers of the bundled checkpoint; None if not asked at this depth.
    """

    loops: int
    decode_mode: DecodeMode
    rates: Sequence[float]
    relative_times: Sequence[float]
    time_goal: float | None
    latency_seconds: float
    kv_bytes_per_token: int
    open_chunk_bytes: int
    accuracy: float | None

    @property
    def tokens_per_second(self) -> float:
        """The median round's."""
        return median(self.rates)

    @property
    def relative_time(self) -> float:
        """The median round's."""
        return median(self.relative_times)


@dataclass(frozen=True)
class Mix:
    """Half of the requests at one depth and half at a larger, against all at the larger.

    Attributes:
        loops: the two depths.
        tokens_per_second: generated tokens of all requests, the median round.
        deep_tokens_per_second: the same with all at the larger.
        ratios: speed of the mix over that of all at the larger, in each round.
        goal: for the median ratio; None if there is none for these depths.
        kv_bytes_per_token: final rows, of requests of both depths side by side.
    """

    loops: tuple[int, int]
    tokens_per_second: float
    deep_tokens_per_second: float
    ratios: Sequence[float]
    goal: float | None
    kv_bytes_per_token: int

    @property
    def ratio(self) -> float:
        """The median round's."""
        return median(self.ratios)


@dataclass(frozen=True)
class Served:
    """What one engine did.

    Attributes:
        held: bytes by work, as `Row` has them.
        seconds: of each round, by work.
        latencies: seconds between two tokens in each round, by depth.
    """

    held: dict[str, dict[str, int]]
    seconds: dict[str, list[float]]
    latencies: dict[int, list[float]]


def measure(options: Options) -> tuple[list[Row], Mix | None]:
    """Serve every round at every depth with one engine; then ask the bundled checkpoint.

    Raises:
        BenchError: the options fit no engine, or one of them failed; the message names it.
    """
    refuse(options.hidden, options.chunk_size, options.decode_mode)
    refuse_depths(options)
    asked = [loops for loops in options.depths if options.questions and loops <= trained_loops()]
    works = len(workloads(options))
    visits = works + options.rounds * (works + len(options.depths)) + len(asked)
    with tqdm(total=visits, unit="run", desc="starting", disable=None) as progress:
        with Engine(f"MELT, {options.decode_mode} mode", options.checkpoint, engine_arguments(options)) as engine:
            engine.answer()
            served = serve(options, engine, progress)
        right = answer(options, asked, progress) if asked else {}
    return depth_rows(options, served, right), mix_row(options, served)


def serve(options: Options, engine: Engine, progress: tqdm) -> Served:
    """Count the blocks of all works, and so warm the engine up; then go round."""
    works = workloads(options)
    served = Served({}, {name: [] for name in works}, {loops: [] for loops in options.depths})
    for name in works:
        progress.set_description(f"{name}, blocks")
        served.held[name] = engine.ask("rows_held", **load(options, 0, works[name]))
        progress.update()
    for number in range(1, options.rounds + 1):
        # Who goes first changes, so that a machine that slows down favours nobody.
        order = 1 if number % 2 else -1
        for name in list(works)[::order]:
            progress.set_description(name)
            served.seconds[name].append(engine.ask("generate", **load(options, number, works[name])))
            progress.update()
        for loops in options.depths[::order]:
            progress.set_description(f"T={loops}, alone")
            facts = {"prompt": options.prompt, "generated": options.generated, "seed": number, "loops": loops}
            served.latencies[loops].append(engine.ask("latency", **facts))
            progress.update()
    return served


def answer(options: Options, depths: Sequence[int], progress: tqdm) -> dict[int, float]:
    """The share of right answers by depth, from a second engine with the bundled checkpoint."""
    progress.set_description("starting")
    arguments = {**ACCURACY_CACHE, "block_size": BLOCK_SIZE, "hf_overrides": {"decode_mode": options.decode_mode}}
    right = {}
    with Engine(f"{MELT.name}, {options.decode_mode} mode", MELT, arguments) as engine:
        engine.answer()
        for loops in depths:
            progress.set_description(f"T={loops}, questions")
            right[loops] = engine.ask("share_right", questions=options.questions, loops=loops)
            progress.update()
    return right


def refuse_depths(options: Options) -> None:
    """Say before the engines start what cannot be served or compared.

    Raises:
        BenchError: the option, and what it must be.
    """
    deepest = max(options.loops)
    if options.generated == 1:
        raise BenchError("--generated=1 leaves no time between two tokens to measure; it must be at least 2")
    if options.mixed is not None:
        if options.mixed[1] > deepest:
            raise BenchError(f"--mix={options.mixed[0]},{options.mixed[1]} is deeper than the {deepest} of --loops")
        if options.requests % 2:
            raise BenchError(f"--requests={options.requests} must be even: a mix has half of them at each depth")
    if options.questions and min(options.loops) > trained_loops():
        raise BenchError(
            f"--accuracy={options.questions} asks the bundled checkpoint, which runs at most {trained_loops()} loops: "
            f"none of --loops is as few"
        )


def trained_loops() -> int:
    """The most loops that the bundled checkpoint runs."""
    most = MeltConfig.from_pretrained(MELT).max_loops
    assert most is not None
    return most


def workloads(options: Options) -> dict[str, list[int]]:
    """The loops of each request, by what the work is called."""
    works = {f"T={loops}": [loops] * options.requests for loops in options.depths}
    if options.mixed is None:
        return works
    # Neighbours in time, also where the deep one of the pair is among the depths: their ratio is the result.
    return {
        **works,
        "mix": [*options.mixed] * (options.requests // 2),
        "all deep": [options.mixed[1]] * options.requests,
    }


def load(options: Options, seed: int, loops: list[int]) -> dict[str, object]:
    """The requests of a round, which are the same at every depth."""
    return {
        "requests": options.requests,
        "prompt": options.prompt,
        "generated": options.generated,
        "seed": seed,
        "loops": loops,
    }


def engine_arguments(options: Options) -> dict[str, object]:
    """vLLM's, with room for all requests at once at the largest depth."""
    context, config = options.prompt + options.generated, options.checkpoint.config
    blocks = math.ceil(context / BLOCK_SIZE)
    if options.decode_mode == "chunk":
        blocks += (max(options.loops) - 1) * options.chunk_size // BLOCK_SIZE
    return {
        # And one block more: vLLM never uses the first block of its pool.
        "kv_cache_memory_bytes": (options.requests * blocks + 1) * BLOCK_SIZE * kv_bytes_per_token(config, 2),
        "block_size": BLOCK_SIZE,
        "max_model_len": context,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": options.requests,
        "enable_prefix_caching": False,  # the same prompts come again
        "disable_log_stats": False,  # their clock tells the latency
    }


def depth_rows(options: Options, served: Served, right: dict[int, float]) -> list[Row]:
    """What was measured at each depth, and what is asked of it."""
    tokens = options.requests * options.generated
    return [
        Row(
            loops=loops,
            decode_mode=options.decode_mode,
            rates=[tokens / each for each in served.seconds[f"T={loops}"]],
            relative_times=ratios(served.seconds[f"T={loops}"], served.seconds[f"T={options.base}"]),
            time_goal=TIME_GOALS.get(loops) if options.base == USUAL_LOOPS else None,
            latency_seconds=median(served.latencies[loops]),
            **served.held[f"T={loops}"],
            accuracy=right.get(loops),
        )
        for loops in options.depths
    ]


def mix_row(options: Options, served: Served) -> Mix | None:
    """What was measured of the mix, and what is asked of it; None if there was none."""
    if options.mixed is None:
        return None
    tokens = options.requests * options.generated
    return Mix(
        loops=options.mixed,
        tokens_per_second=tokens / median(served.seconds["mix"]),
        deep_tokens_per_second=tokens / median(served.seconds["all deep"]),
        ratios=ratios(served.seconds["all deep"], served.seconds["mix"]),
        goal=MIX_GOALS.get(options.mixed),
        kv_bytes_per_token=served.held["mix"]["kv_bytes_per_token"],
    )


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """One time over the other, round by round."""
    return [time / other for time, other in zip(times, others, strict=True)]


def facts(rows: Sequence[Row], mix: Mix | None) -> dict[str, object]:
    """The same for machines."""
    each = [
        {**asdict(row), "tokens_per_second": row.tokens_per_second, "relative_time": row.relative_time} for row in rows
    ]
    return {"rows": each, "mix": None if mix is None else {**asdict(mix), "ratio": mix.ratio}}


def table(rows: Sequence[Row], mix: Mix | None, base: int) -> str:
    """What was measured and what was asked of it; B are bytes."""
    speed, time = ("tok/s", "min", "max", "alone"), (f"time / T={base}", "min", "max", "goal")
    lines: list[tuple[str, ...]] = [("T", *speed, *time, "KV a token", "open chunk", "right")]
    for row in rows:
        lines.append(
            (
                str(row.loops),
                f"{row.tokens_per_second:.1f}",
                f"{min(row.rates):.1f}",
                f"{max(row.rates):.1f}",
                f"{row.latency_seconds * 1e3:.1f} ms/tok",
                f"{row.relative_time:.2f}x",
                f"{min(row.relative_times):.2f}",
                f"{max(row.relative_times):.2f}",
                judged(row.time_goal, row.time_goal is not None and row.relative_time <= row.time_goal),
                f"{row.kv_bytes_per_token:,} B",
                f"{row.open_chunk_bytes:,} B",
                "-" if row.accuracy is None else f"{row.accuracy:.1%}",
            )
        )
    text = columns(lines)
    if mix is not None:
        text += f"\n\n{mix_table(mix)}"
    held = [each.kv_bytes_per_token for each in rows] + ([mix.kv_bytes_per_token] if mix else [])
    if len(held) > 1:
        same = len(set(held)) == 1
        text += f"\n\nKV bytes a token, goal the same at every depth: {'reached' if same else 'missed'}"
    return text


def mix_table(mix: Mix) -> str:
    """The mix against all requests at its larger depth."""
    few, many = mix.loops
    return columns(
        [
            ("requests", "mixed", f"all T={many}", "ratio", "min", "max", "goal", "KV a token"),
            (
                f"half T={few}, half T={many}",
                f"{mix.tokens_per_second:.1f} tok/s",
                f"{mix.deep_tokens_per_second:.1f} tok/s",
                f"{mix.ratio:.2f}x",
                f"{min(mix.ratios):.2f}",
                f"{max(mix.ratios):.2f}",
                judged(mix.goal, mix.goal is not None and mix.ratio >= mix.goal),
                f"{mix.kv_bytes_per_token:,} B",
            ),
        ]
    )


def judged(goal: float | None, reached: bool) -> str:
    """A goal in a table, and what became of it."""
    return "-" if goal is None else f"{goal:.2f} {'reached' if reached else 'missed'}"


def figure(rows: Sequence[Row], base: int) -> "Figure":
    """Time, throughput, rows and, if measured, right answers, over the loops."""
    from matplotlib.figure import Figure

    trained = [row for row in rows if row.accuracy is not None]
    drawn = Figure(figsize=(16 if trained else 12, 4), layout="constrained")
    loops = [row.loops for row in rows]
    time, rate, held, *rest = drawn.subplots(1, 4 if trained else 3)
    for axes, title in (
        (time, f"time for the same requests, over T={base}'s"),
        (rate, "generated tokens a second"),
        (held, "KV cache, bytes"),
        *((axes, "right answers, bundled checkpoint") for axes in rest),
    ):
        axes.set(title=title, xlabel="loops T")
        axes.set_xscale("log", base=2)
        axes.set_xticks(loops, [str(each) for each in loops])
        axes.grid(alpha=0.3)
    spread(time, loops, [row.relative_times for row in rows])
    spread(rate, loops, [row.rates for row in rows])
    held.plot(loops, [row.kv_bytes_per_token for row in rows], marker="o", label="a token")
    if opened := [row for row in rows if row.open_chunk_bytes]:
        open_chunk = [row.open_chunk_bytes for row in opened]
        held.plot([row.loops for row in opened], open_chunk, marker="s", linestyle="--", label="a request's open chunk")
        held.set_yscale("log", base=2)
    else:
        held.set_ylim(bottom=0)
    held.yaxis.set_major_formatter("{x:,.0f}")
    held.legend()
    for axes in (time, rate):
        axes.set_ylim(bottom=0)
    for axes in rest:
        axes.plot([row.loops for row in trained], [row.accuracy for row in trained], marker="o")
        axes.set_ylim(0, 1.05)
    return drawn


def spread(axes: "Axes", loops: Sequence[int], rounds: Sequence[Sequence[float]]) -> None:
    """Medians with their spread."""
    middles = [median(each) for each in rounds]
    below = [middle - min(each) for middle, each in zip(middles, rounds, strict=True)]
    above = [max(each) - middle for middle, each in zip(middles, rounds, strict=True)]
    axes.errorbar(loops, middles, yerr=(below, above), marker="o", capsize=4)
