"""`melt-serve bench depth`: one MELT engine, asked for more or fewer loops: time, rows, and right answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.accuracy import accuracy_by_depth, trained_loops
from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.options import flag
from melt_serve.bench.report import draw_spread, judged, set_loop_axis, spread, verdict
from melt_serve.bench.shapes import BLOCK_SIZE, DTYPES, VALUE_BYTES, Checkpoint, Dtype, scaled_shape
from melt_serve.bench.throughput import STEP_TOKENS, refuse
from melt_serve.terminal import columns, loop_list, positive, two_depths, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from melt_serve.config import DecodeMode

HELP = "time, cache and right answers with more or fewer loops"
DESCRIPTION = """\
Serve the same requests at each depth with one MELT engine, round by round. It has random weights and is built once,
for the most loops; each request says its own. Shown are tokens a second, the time between two tokens of a request
that is alone, the time relative to 4 loops, and the KV cache that a token and a request's open chunk take, counted
in the blocks that the engine gave away. Then half of the requests think less than the others, against all at the
larger depth."""
EXAMPLES = """\
examples:
  melt-serve bench depth
      8 layers, d=512, 16 requests of 128 + 64 tokens, at 1 to 16 loops; takes ten minutes or so on 2 quiet CPU cores
  melt-serve bench depth --accuracy 200 --plot depth.png
      also the share of right answers of the bundled checkpoint, as deep as it goes, and a figure
  melt-serve bench depth --decode-mode chunk --chunk-size 64
      the other decode mode, in which an open chunk keeps rows of every loop
  melt-serve bench depth --loops 1,2,4 --mix 2,4 --layers 2 --requests 8 --generated 32 --json
      smaller and quicker, another mix, and one line of JSON at the end"""

USUAL_LOOPS = 4
"""Ouro's depth: times are relative to it, or to the measured depth nearest to it."""

TIME_GOALS = {1: 0.35}
"""The most time a depth should take of T=4's."""

MIX_GOALS = {(1, 8): 1.4}
"""What the throughput should gain where half of the requests think this much less than the others."""


@dataclass(frozen=True)
class Options:
    """What to measure; the engine is built for the largest of the depths."""

    layers: int = flag(8, "layers of the model", positive, "N")
    hidden: int = flag(512, "hidden size, a multiple of 64", positive, "D")
    loops: Sequence[int] = flag((1, 2, 4, 8, 16), "depths", loop_list, "T,T")
    mix: tuple[int, int] | None = flag(
        None,
        "half of the requests at the first, half at the second depth, against all at the second "
        "(default: 1,8, or 1 and the most of --loops where that is less)",
        two_depths,
        "T,T",
    )
    decode_mode: "DecodeMode" = flag("token", "the MELT's", choices=("token", "chunk"))
    chunk_size: int = flag(32, "the MELT's, in chunk mode a multiple of 32", positive, "C")
    requests: int = flag(16, "requests, all there from the start", positive, "N")
    prompt: int = flag(128, "tokens of a prompt", positive, "N")
    generated: int = flag(64, "tokens of an answer", positive, "N")
    rounds: int = flag(3, "how often each depth serves them", positive, "N")
    dtype: Dtype = flag("bfloat16", "of weights and rows; many CPUs multiply float32 faster in batches", choices=DTYPES)
    questions: int = flag(
        0,
        "also ask the bundled checkpoint N held-out questions at each depth it runs; 200 tell depths apart, 0 is none",
        whole,
        "N",
        name="--accuracy",
    )

    @property
    def depths(self) -> list[int]:
        """All depths, each once, the smallest first."""
        return sorted(set(self.loops))

    @property
    def mixed(self) -> tuple[int, int] | None:
        """The two depths of the mix; None if there is only one depth."""
        default = (1, min(8, max(self.loops)))
        return self.mix or (default if default[1] > 1 else None)

    @property
    def base(self) -> int:
        """The depth whose time is 1."""
        return base_of(self.depths)

    @property
    def checkpoint(self) -> Checkpoint:
        """The MELT with random weights, for up to the most loops."""
        return Checkpoint(
            scaled_shape(self.layers, self.hidden), "melt", max(self.loops), self.chunk_size, self.decode_mode
        )


@dataclass(frozen=True)
class Result:
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
    decode_mode: "DecodeMode"
    rates: Sequence[float]
    relative_times: Sequence[float]
    time_goal: float | None
    latency_seconds: float
    kv_bytes_per_token: int
    open_chunk_bytes: int
    accuracy: float | None

    @property
    def tokens_per_second(self) -> float:
        """The median of `rates`."""
        return median(self.rates)

    @property
    def relative_time(self) -> float:
        """The median of `relative_times`."""
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
        """The median of `ratios`."""
        return median(self.ratios)


@dataclass(frozen=True)
class Measured:
    """Every depth, and the mix of two of them if there was one."""

    results: Sequence[Result]
    mix: Mix | None


@dataclass(frozen=True)
class Served:
    """What one engine did.

    Attributes:
        held: bytes by work, as `Result` has them.
        seconds: of each round, by work.
        latencies: seconds between two tokens in each round, by depth.
    """

    held: dict[str, dict[str, int]]
    seconds: dict[str, list[float]]
    latencies: dict[int, list[float]]


def measure(options: Options) -> Measured:
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
        right = accuracy_by_depth(asked, options.questions, options.decode_mode, progress) if asked else {}
    return Measured(depth_results(options, served, right), mix_result(options, served))


def serve(options: Options, engine: Engine, progress: tqdm) -> Served:
    """Count the blocks of all works, which warms the engine up; then serve them in every round."""
    works = workloads(options)
    served = Served({}, {name: [] for name in works}, {loops: [] for loops in options.depths})
    for name in works:
        progress.set_description(f"{name}, blocks")
        served.held[name] = engine.ask("rows_held", **generate_arguments(options, 0, works[name]))
        progress.update()
    for number in range(1, options.rounds + 1):
        # Who goes first changes, so that a machine that slows down favours nobody.
        order = 1 if number % 2 else -1
        for name in list(works)[::order]:
            progress.set_description(name)
            served.seconds[name].append(engine.ask("generate", **generate_arguments(options, number, works[name])))
            progress.update()
        for loops in options.depths[::order]:
            progress.set_description(f"T={loops}, alone")
            lengths = {"prompt": options.prompt, "generated": options.generated}
            served.latencies[loops].append(engine.ask("latency", **lengths, seed=number, loops=loops))
            progress.update()
    return served


def refuse_depths(options: Options) -> None:
    """Refuse before the engines start what cannot be served or compared.

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


def workloads(options: Options) -> dict[str, list[int]]:
    """Return the loops of each request, by the name of the work."""
    works = {f"T={loops}": [loops] * options.requests for loops in options.depths}
    if options.mixed is None:
        return works
    # Neighbours in time, also where the deep one of the pair is among the depths: their ratio is the result.
    return {
        **works,
        "mix": [*options.mixed] * (options.requests // 2),
        "all deep": [options.mixed[1]] * options.requests,
    }


def generate_arguments(options: Options, seed: int, loops: list[int]) -> dict[str, object]:
    """Return a round's requests, as the worker's `generate` takes them; their prompts are the same at every depth."""
    return {
        "requests": options.requests,
        "prompt": options.prompt,
        "generated": options.generated,
        "seed": seed,
        "loops": loops,
    }


def engine_arguments(options: Options) -> dict[str, object]:
    """Return vLLM's arguments, with room for all requests at once at the largest depth."""
    context = options.prompt + options.generated
    blocks = math.ceil(context / BLOCK_SIZE)
    if options.decode_mode == "chunk":
        blocks += (max(options.loops) - 1) * options.chunk_size // BLOCK_SIZE
    block = BLOCK_SIZE * options.checkpoint.kv_bytes_per_token(VALUE_BYTES[options.dtype])
    return {
        # And one block more: vLLM never uses the first block of its pool.
        "kv_cache_memory_bytes": (options.requests * blocks + 1) * block,
        "block_size": BLOCK_SIZE,
        "max_model_len": context,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": options.requests,
        "dtype": options.dtype,
        "enable_prefix_caching": False,  # the same prompts come again
        "disable_log_stats": False,  # their clock tells the latency
    }


def depth_results(options: Options, served: Served, right: dict[int, float]) -> list[Result]:
    """Gather what was measured at each depth, and its goal.

    Args:
        right: the share of right answers by depth, where the bundled checkpoint was asked.
    """
    tokens = options.requests * options.generated
    return [
        Result(
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


def mix_result(options: Options, served: Served) -> Mix | None:
    """Gather what was measured of the mix, and its goal; None if there was no mix."""
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
    """Divide times by others, round by round."""
    return [time / other for time, other in zip(times, others, strict=True)]


def base_of(depths: Sequence[int]) -> int:
    """Return the depth that times are relative to: the nearest to `USUAL_LOOPS`, of two the first."""
    return min(depths, key=lambda loops: abs(loops - USUAL_LOOPS))


def table(measured: Measured) -> str:
    """Show what was measured, and the goals; B are bytes."""
    base = base_of([result.loops for result in measured.results])
    speed, time = ("tok/s", "min", "max", "alone"), (f"time / T={base}", "min", "max", "goal")
    lines: list[tuple[str, ...]] = [("T", *speed, *time, "KV a token", "open chunk", "right")]
    for result in measured.results:
        lines.append(
            (
                str(result.loops),
                *spread(result.rates, digits=1, unit=""),
                f"{result.latency_seconds * 1e3:.1f} ms/tok",
                *spread(result.relative_times),
                judged(result.time_goal, result.relative_time, at_most=True),
                f"{result.kv_bytes_per_token:,} B",
                f"{result.open_chunk_bytes:,} B",
                "-" if result.accuracy is None else f"{result.accuracy:.1%}",
            )
        )
    parts = [columns(lines)]
    held = [result.kv_bytes_per_token for result in measured.results]
    if measured.mix is not None:
        parts.append(mix_table(measured.mix))
        held.append(measured.mix.kv_bytes_per_token)
    if len(held) > 1:
        parts.append(f"KV bytes a token, goal the same at every depth: {verdict(len(set(held)) == 1)}")
    return "\n\n".join(parts)


def mix_table(mix: Mix) -> str:
    """Show the mix against all requests at its larger depth."""
    few, many = mix.loops
    return columns(
        [
            ("requests", "mixed", f"all T={many}", "ratio", "min", "max", "goal", "KV a token"),
            (
                f"half T={few}, half T={many}",
                f"{mix.tokens_per_second:.1f} tok/s",
                f"{mix.deep_tokens_per_second:.1f} tok/s",
                *spread(mix.ratios),
                judged(mix.goal, mix.ratio),
                f"{mix.kv_bytes_per_token:,} B",
            ),
        ]
    )


def figure(measured: Measured) -> "Figure":
    """Draw time, throughput, rows and, if measured, right answers, over the loops."""
    from matplotlib.figure import Figure

    results = measured.results
    trained = [result for result in results if result.accuracy is not None]
    drawn = Figure(figsize=(16 if trained else 12, 4), layout="constrained")
    loops = [result.loops for result in results]
    time, rate, held, *rest = drawn.subplots(1, 4 if trained else 3)
    set_loop_axis(time, f"time for the same requests, over T={base_of(loops)}'s", loops)
    set_loop_axis(rate, "generated tokens a second", loops)
    set_loop_axis(held, "KV cache, bytes", loops)
    draw_spread(time, loops, [result.relative_times for result in results])
    draw_spread(rate, loops, [result.rates for result in results])
    held.plot(loops, [result.kv_bytes_per_token for result in results], marker="o", label="a token")
    if opened := [result for result in results if result.open_chunk_bytes]:
        deep, open_chunk = zip(*((result.loops, result.open_chunk_bytes) for result in opened), strict=True)
        held.plot(deep, open_chunk, marker="s", linestyle="--", label="a request's open chunk")
        held.set_yscale("log", base=2)
    else:
        held.set_ylim(bottom=0)
    held.yaxis.set_major_formatter("{x:,.0f}")
    held.legend()
    for axes in (time, rate):
        axes.set_ylim(bottom=0)
    for axes in rest:
        set_loop_axis(axes, "right answers, bundled checkpoint", loops)
        axes.plot([result.loops for result in trained], [result.accuracy for result in trained], marker="o")
        axes.set_ylim(0, 1.05)
    return drawn
