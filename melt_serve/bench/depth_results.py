"""What `melt-serve bench depth` measured, as a table and as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from melt_serve.bench import accuracy
from melt_serve.bench.accuracy import Answers
from melt_serve.bench.report import draw_spread, judged, set_loop_axis, spread, verdict
from melt_serve.bench.shapes import Model
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from melt_serve.config import DecodeMode

NAMES: dict[Model, str] = {"melt": "MELT", "looplm": "LoopLM"}

USUAL_LOOPS = 4
"""Ouro's depth: times are relative to it, or to the measured depth nearest to it."""


@dataclass(frozen=True)
class Result:
    """One model at one depth.

    Attributes:
        decode_mode: None of a LoopLM.
        rates: generated tokens a second, in each round.
        relative_times: its time over that of the base depth in the same round.
        time_goal: the most that their median should be; None if there is none for this depth.
        latency_seconds: between two tokens of a request served alone, the median round.
        kv_bytes_per_token: final rows, as the pool had given blocks away for them.
        open_chunk_bytes: rows of loops 1..T-1 that a request held of its open chunk, at most.
    """

    model: Model
    loops: int
    decode_mode: "DecodeMode | None"
    rates: Sequence[float]
    relative_times: Sequence[float]
    time_goal: float | None
    latency_seconds: float
    kv_bytes_per_token: int
    open_chunk_bytes: int

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
    """Half of a model's requests at one depth and half at a larger, against all at the larger.

    Attributes:
        loops: the two depths.
        tokens_per_second: generated tokens of all requests, the median round.
        deep_tokens_per_second: the same with all at the larger.
        ratios: speed of the mix over that of all at the larger, in each round.
        goal: for the median ratio; None if there is none for these depths.
        kv_bytes_per_token: final rows, of requests of both depths side by side.
    """

    model: Model
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
    """Every model at every depth, the mixes of two of them if there were any, and the bundled checkpoints' answers."""

    results: Sequence[Result]
    mixes: Sequence[Mix]
    answers: Sequence[Answers]


def table(measured: Measured) -> str:
    """Show what was measured, and the goals; B are bytes."""
    base = base_of([result.loops for result in measured.results])
    speed, time = ("tok/s", "min", "max", "alone"), (f"time / T={base}", "min", "max", "goal")
    lines: list[tuple[str, ...]] = [("model", "T", *speed, *time, "KV a token", "open chunk")]
    for result in measured.results:
        lines.append(
            (
                NAMES[result.model],
                str(result.loops),
                *spread(result.rates, digits=1, unit=""),
                f"{result.latency_seconds * 1e3:.1f} ms/tok",
                *spread(result.relative_times),
                judged(result.time_goal, result.relative_time, at_most=True),
                f"{result.kv_bytes_per_token:,} B",
                f"{result.open_chunk_bytes:,} B" if result.model == "melt" else "-",
            )
        )
    parts = [columns(lines)]
    if measured.mixes:
        parts.append(mix_table(measured.mixes))
    counted: list[Result | Mix] = [*measured.results, *measured.mixes]
    held = [each.kv_bytes_per_token for each in counted if each.model == "melt"]
    if len(held) > 1:
        parts.append(f"A MELT's KV bytes a token, goal the same at every depth: {verdict(len(set(held)) == 1)}")
    if measured.answers:
        parts.append(accuracy.table(measured.answers))
    return "\n\n".join(parts)


def mix_table(mixes: Sequence[Mix]) -> str:
    """Show each model's mix against all requests at its larger depth."""
    few, many = mixes[0].loops
    lines: list[tuple[str, ...]] = [
        (f"half T={few}, half T={many}", "mixed", f"all T={many}", "ratio", "min", "max", "goal", "KV a token")
    ]
    for mix in mixes:
        lines.append(
            (
                NAMES[mix.model],
                f"{mix.tokens_per_second:.1f} tok/s",
                f"{mix.deep_tokens_per_second:.1f} tok/s",
                *spread(mix.ratios),
                judged(mix.goal, mix.ratio),
                f"{mix.kv_bytes_per_token:,} B",
            )
        )
    return columns(lines)


def figure(measured: Measured) -> "Figure":
    """Draw time, throughput, rows and, if measured, right answers, over the loops."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(16 if measured.answers else 12, 4), layout="constrained")
    loops = sorted({result.loops for result in measured.results})
    time, rate, held, *rest = drawn.subplots(1, 4 if measured.answers else 3)
    set_loop_axis(time, f"time for the same requests, over T={base_of(loops)}'s", loops)
    set_loop_axis(rate, "generated tokens a second", loops)
    set_loop_axis(held, "KV cache, bytes", loops)
    for model in dict.fromkeys(result.model for result in measured.results):
        results = [result for result in measured.results if result.model == model]
        depths = [result.loops for result in results]
        draw_spread(time, depths, [result.relative_times for result in results], NAMES[model])
        draw_spread(rate, depths, [result.rates for result in results], NAMES[model])
        held.plot(
            depths, [result.kv_bytes_per_token for result in results], marker="o", label=f"{NAMES[model]}, a token"
        )
        if opened := [result for result in results if result.open_chunk_bytes]:
            deep, open_chunk = zip(*((result.loops, result.open_chunk_bytes) for result in opened), strict=True)
            held.plot(deep, open_chunk, marker="s", linestyle="--", label="a request's open chunk")
            held.set_yscale("log", base=2)
    held.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (time, rate, held):
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.legend()
    for axes in rest:
        accuracy.draw(axes, measured.answers)
    return drawn


def base_of(depths: Sequence[int]) -> int:
    """Return the depth that times are relative to: the nearest to `USUAL_LOOPS`, of two the first."""
    return min(depths, key=lambda loops: abs(loops - USUAL_LOOPS))
