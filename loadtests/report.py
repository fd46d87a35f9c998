"""The report of a run: one HTML file with plots, the numbers, and a verdict."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, mean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.scenarios import Step
from loadtests.seen import Asked, Sample

FLAT = 0.02
"""The share by which memory may differ between depths."""
ALIKE = 0.10
"""The share by which the bytes that a request holds may differ between depths. They are read once a second, and differ
by how far requests have come just then. A LoopLM's would double from depth to depth."""
LEAK = 0.01
"""The share of its memory that a server may grow by in an hour, from the second half of a soak on."""
SOAK_SECONDS = 600
"""A run shorter than this tells nothing of leaks: allocators are still filling their pools."""
SLACK = 1.25
"""Time may grow by this factor faster than loops."""
MELT, LOOPLM = "#0f6b72", "#b3541e"


@dataclass
class Run:
    """What was seen of one server.

    Attributes:
        model: the name it serves.
        loops: a LoopLM's; None for a MELT, whose requests choose.
        missed: samples that the server did not answer.
    """

    model: str
    loops: int | None
    steps: list[Step]
    asked: list[Asked]
    samples: list[Sample]
    missed: int = 0


@dataclass(frozen=True)
class Verdict:
    """One thing that must hold."""

    what: str
    holds: bool
    found: str
    bound: str


@dataclass
class Depth:
    """A server at one depth, when the load on it was steady.

    Attributes:
        memory: of its processes, in bytes: the median.
        row: KV bytes of a token.
        held: KV bytes that a running request holds in the end: the 95th percentile of the bytes in use over the
            requests, when no more could run. (All begin together, so a mean depends on when one looks.)
        running, waiting: requests: the mean.
        rate: tokens a second.
        wait, pace: seconds to the first token, and from one to the next: medians.
        right: the share of right answers.
    """

    loops: int
    memory: float = 0
    row: float = 0
    held: float = 0
    running: float = 0
    waiting: float = 0
    preemptions: float = 0
    rate: float = 0
    wait: float = 0
    pace: float = 0
    right: float = 0
    requests: int = 0
    errors: list[str] = field(default_factory=list)


def depths_of(run: Run) -> list[Depth]:
    """Return what was measured in each step of a single depth, once the load of the step before has gone."""
    depths, start = [], 0.0
    for number, step in enumerate(run.steps):
        end = start + step.seconds
        if len(step.loops) == 1:
            settled = max((each.start + each.seconds for each in run.asked if each.start < start), default=start)
            samples = [each for each in run.samples if each.step == number and each.at >= settled]
            asked = [each for each in run.asked if each.loops == step.loops[0] and start <= each.start < end]
            if len(samples) > 1 and asked:
                depths.append(measured(step.loops[0], samples, asked))
        start = end
    return depths


def measured(loops: int, samples: Sequence[Sample], asked: Sequence[Asked]) -> Depth:
    """Summarize what was seen of a server at one depth."""
    good = [each for each in asked if each.error is None]
    most = max(each.running for each in samples)
    return Depth(
        loops,
        memory=median(each.memory for each in samples),
        row=samples[-1].kv_bytes_per_token,
        held=centiles([each.kv_in_use / most for each in samples if each.running == most])[1] if most else 0,
        running=mean(each.running for each in samples),
        waiting=mean(each.waiting for each in samples),
        preemptions=samples[-1].preemptions - samples[0].preemptions,
        rate=(samples[-1].generated - samples[0].generated) / (samples[-1].at - samples[0].at),
        wait=median(each.first for each in good) if good else 0,
        pace=median(each.seconds_per_token for each in good) if good else 0,
        right=mean(each.right for each in good) if good else 0,
        requests=len(asked),
        errors=[each.error for each in asked if each.error],
    )


def judge(scenario: str, runs: Sequence[Run]) -> list[Verdict]:
    """Judge what must hold of these runs; of a LoopLM, which is there for comparison, only that it answers."""
    errors = [each.error for run in runs for each in run.asked if each.error]
    missed = sum(run.missed for run in runs)
    requests = sum(len(run.asked) for run in runs)
    verdicts = [
        Verdict(
            "no errors",
            not errors,
            f"{len(errors)} of {requests} requests" + "".join(f"; {e}" for e in errors[:1]),
            "0",
        ),
        Verdict("the server always answers its monitor", not missed, f"{missed} samples missed", "0"),
    ]
    melt = next((run for run in runs if run.loops is None), None)
    if melt is None:
        return verdicts
    depths = depths_of(melt)
    if len(depths) > 1:
        verdicts += flat(depths) + proportional(depths)
    if melt.samples and melt.samples[-1].at >= SOAK_SECONDS:
        verdicts.append(leaks_not(melt.samples))
    elif scenario == "soak":
        verdicts.append(Verdict("no leak", False, "the run was too short to tell", f"at least {SOAK_SECONDS} s"))
    return verdicts


def flat(depths: Sequence[Depth]) -> list[Verdict]:
    """Judge whether memory is independent of loops."""
    span = f"{depths[0].loops} to {depths[-1].loops} loops"
    rows = {each.row for each in depths}
    verdicts = [
        Verdict(f"KV bytes of a token, {span}", len(rows) == 1, ", ".join(f"{row:,.0f}" for row in rows), "one number")
    ]
    for what, values, bound in (
        ("memory of the processes", [each.memory for each in depths], FLAT),
        ("KV bytes a running request holds", [each.held for each in depths], ALIKE),
    ):
        spread = max(values) / min(values) - 1 if min(values) else float("inf")
        verdicts.append(
            Verdict(
                f"{what}, {span}",
                spread <= bound,
                f"{spread:.2%} between the least and the most",
                f"at most {bound:.0%}",
            )
        )
    return verdicts


def proportional(depths: Sequence[Depth]) -> list[Verdict]:
    """Judge whether time a token grows with loops, and not faster."""
    worst = max(
        (deep.pace / shallow.pace / (deep.loops / shallow.loops) for shallow, deep in pairwise(depths)), default=0
    )
    rises = all(deep.pace > shallow.pace for shallow, deep in pairwise(depths))
    found = ", ".join(f"{each.loops}: {1000 * each.pace:.1f} ms" for each in depths)
    return [
        Verdict(
            "time a token in proportion to loops",
            rises and worst <= SLACK,
            found,
            f"rises, at most {SLACK} times as fast as loops",
        )
    ]


def leaks_not(samples: Sequence[Sample]) -> Verdict:
    """Judge the slope of memory over the second half, by least squares."""
    half = [each for each in samples if each.at >= samples[-1].at / 2]
    slope = 3600 * linear_regression([each.at for each in half], [each.memory for each in half]).slope
    share = slope / half[0].memory
    return Verdict(
        "no leak", share <= LEAK, f"{slope / 2**20:+.1f} MiB an hour, {share:+.2%}", f"at most {LEAK:.0%} an hour"
    )


# Drawing


def draw_depths(melt: Sequence[Depth], looplm: Sequence[Depth]) -> Figure:
    """Draw what deeper loops cost a MELT and a LoopLM: the picture of what this project is for."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    panels = (
        ("KV bytes a running request holds", lambda each: each.held / 1024, "KiB", True),
        ("requests that run at the same time", lambda each: each.running, "", False),
        ("tokens a second, all requests together", lambda each: each.rate, "", True),
        ("right answers", lambda each: 100 * each.right, "%", False),
    )
    for axis, (title, value, unit, doubling) in zip(axes, panels, strict=True):
        for name, depths, color, style in (("LoopLM", looplm, LOOPLM, "s--"), ("MELT", melt, MELT, "o-")):
            if depths:
                axis.plot(
                    [each.loops for each in depths], [value(each) for each in depths], style, color=color, label=name
                )
        axis.set_xscale("log", base=2)
        if doubling:
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks([each.loops for each in melt], [str(each.loops) for each in melt])
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        axis.set_xlabel("loops")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def draw_time(run: Run) -> Figure:
    """Draw memory, rows, load and times of a whole run on one clock."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    memory, rows, load, times = figure.subplots(4, 1, sharex=True)
    clock = [each.at for each in run.samples]

    def lines(axis: Axes, unit: str, **series: list[float]) -> None:
        for (label, values), color in zip(series.items(), (MELT, LOOPLM, "#777777"), strict=False):
            axis.plot(clock, values, color=color, label=label.replace("_", " "), linewidth=1.2)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")

    lines(memory, "MiB", memory_of_all_processes=[each.memory / 2**20 for each in run.samples])
    looplm = {} if run.loops else {"a_LoopLM_would_hold": [each.kv_looplm / 1024 for each in run.samples]}
    lines(rows, "KiB", KV_bytes_in_use=[each.kv_in_use / 1024 for each in run.samples], **looplm)
    lines(
        load,
        "requests",
        running=[each.running for each in run.samples],
        waiting=[each.waiting for each in run.samples],
        users=[float(each.users) for each in run.samples],
    )
    for loops in sorted({each.loops for each in run.asked}):
        mine = [each for each in run.asked if each.loops == loops and not each.error]
        times.plot(
            [each.start for each in mine], [1000 * each.seconds_per_token for each in mine], ".", ms=3, label=str(loops)
        )
    times.set_yscale("log")
    times.yaxis.set_major_formatter("{x:g}")
    times.set_ylabel("ms a token")
    times.set_xlabel("seconds")
    times.grid(alpha=0.3)
    times.legend(title="loops", fontsize=8, ncols=3, loc="lower right")
    start = 0.0
    for step in run.steps:
        for axis in (memory, rows, load, times):
            axis.axvline(start, color="#999999", linewidth=0.6, linestyle=":")
        start += step.seconds
    return figure


def svg(figure: Figure) -> str:
    """Return a figure as SVG to stand inside HTML, on white whatever the page's colours are."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


# Writing

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { max-width: 64rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
svg { max-width: 100%; height: auto; }
.FAILED { color: light-dark(#b3261e, #ff8a80); font-weight: 700; }
.ok { color: light-dark(#0f6b72, #5cc4cb); font-weight: 700; }
"""


def write(path: Path, scenario: str, runs: Sequence[Run]) -> list[Verdict]:
    """Write the report, and the picture by depth beside it (`.svg`); return its verdicts."""
    verdicts = judge(scenario, runs)
    melt = [each for run in runs if run.loops is None for each in depths_of(run)]
    looplm = [each for run in runs if run.loops is not None for each in depths_of(run)]
    parts = [
        f"<h1>Load test: {scenario}</h1>",
        "<h2>Verdict</h2>",
        table(
            ["", "what", "found", "must be"],
            [["ok" if v.holds else "FAILED", v.what, v.found, v.bound] for v in verdicts],
        ),
    ]
    if melt:
        picture = svg(draw_depths(melt, looplm))
        path.with_suffix(".svg").write_text(picture)
        parts += ["<h2>By depth</h2>", picture, depth_table("MELT", melt)]
        parts += [depth_table("LoopLM", looplm)] if looplm else []
    parts += ["<h2>Requests</h2>", request_table(runs)]
    for run in runs:
        if run.samples:
            name = run.model + (f", {run.loops} loops" if run.loops else "")
            parts += [f"<h2>{html.escape(name)}, second by second</h2>", svg(draw_time(run))]
    title = f"<title>Load test: {scenario}</title>"
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{title}<style>{STYLE}</style></head>\n<body>\n'
    )
    path.write_text(head + "\n".join(parts) + "\n</body></html>\n")
    return verdicts


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; a cell that says ok or FAILED gets its colour."""

    def cell(text: str) -> str:
        return f'<td class="{text}">{text}</td>' if text in ("ok", "FAILED") else f"<td>{html.escape(text)}</td>"

    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "\n".join("<tr>" + "".join(cell(text) for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def depth_table(name: str, depths: Sequence[Depth]) -> str:
    """Return the HTML table of a model, with a line for each depth."""
    heads = (
        "loops,processes,KV a token,KV a running request,running,waiting,preempted,tokens/s,first token,a token,right"
    )
    rows = [
        [
            str(each.loops),
            f"{each.memory / 2**20:,.0f} MiB",
            f"{each.row:,.0f} B",
            f"{each.held / 1024:,.1f} KiB",
            f"{each.running:.1f}",
            f"{each.waiting:.1f}",
            f"{each.preemptions:.0f}",
            f"{each.rate:,.0f}",
            f"{1000 * each.wait:,.0f} ms",
            f"{1000 * each.pace:,.1f} ms",
            f"{each.right:.1%}",
        ]
        for each in depths
    ]
    return f"<h3>{name}</h3>\n" + table(heads.split(","), rows)


def request_table(runs: Sequence[Run]) -> str:
    """Return the HTML table of how long requests took, with a line for each model and depth."""
    rows = []
    for run in runs:
        for loops in sorted({each.loops for each in run.asked}):
            mine = [each for each in run.asked if each.loops == loops]
            good = [each for each in mine if each.error is None]
            if good:
                times = [(each.first, each.seconds_per_token, each.seconds) for each in good]
                spread = [
                    f"{1000 * middle:,.1f} / {1000 * late:,.1f} ms"
                    for middle, late in map(centiles, zip(*times, strict=True))
                ]
                right = f"{mean(each.right for each in good):.1%}"
                rows.append([run.model, str(loops), str(len(mine)), str(len(mine) - len(good)), right, *spread])
    heads = ["model", "loops", "requests", "errors", "right", "first token, median / p95", "a token", "all"]
    return table(heads, rows)


def centiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile."""
    ordered = sorted(values)
    return median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
