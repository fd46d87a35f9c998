"""The memory of training steps as Markdown, plot and JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from melt_serve.train.cost.step_memory import PHASE_1, PHASE_2, WITHOUT, Measured
from melt_serve.train.recipe import PostTraining
from melt_serve.train.results import markdown_table, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Axis = tuple[str, list[Measured], Callable[[Measured], int]]
"""What grows, the steps that differ in it alone, and how much a step has of it."""
INTRODUCTION = """\
# Memory of a training step

Written by `python -m melt_serve.train memory`; read in docs/training.md, "Memory". One step,
forward and backward, of
{sequences} with C = {chunk}: `{recipe}` at 1/{scale} of its width, two layers, {dtype}, {device}. MB are 10^6
bytes, weights not counted; in brackets what `cost` says.

- **the LoopLM's rows**: phase 1 less the same step with MELT's rows alone.
- **checkpointed**: with `checkpoint_chunks`, a chunk's loops run again in the backward pass.
"""


def write_memory_report(
    path: Path, found: Sequence[Measured], recipe: PostTraining, name: str, scale: int
) -> list[Path]:
    """Write `path`, and a plot and JSON beside it; return all three.

    Args:
        name: the recipe's.
    """
    introduction = INTRODUCTION.format(
        sequences="one sequence" if recipe.micro_batch == 1 else f"{recipe.micro_batch} sequences",
        chunk=recipe.chunk_size,
        recipe=name,
        scale=scale,
        dtype=recipe.dtype,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, torch {torch.__version__}",
    )
    tables = (table(found, by_length), table(found, by_loops))
    records = [asdict(each) for each in found]
    return write_report(path, introduction, "peak memory by tokens and loops", plot(found), tables, records)


def by_length(found: Sequence[Measured]) -> Axis:
    """Choose the steps that differ in length alone."""
    usual = most_common([each.loops for each in found])
    return f"tokens, T = {usual}", [each for each in found if each.loops == usual], lambda each: each.length


def by_loops(found: Sequence[Measured]) -> Axis:
    """Choose the steps that differ in loops alone."""
    usual = most_common([each.length for each in found])
    return f"loops, {usual:,} tokens", [each for each in found if each.length == usual], lambda each: each.loops


def most_common(values: Sequence[int]) -> int:
    """Return the value that is there most often."""
    return max(values, key=values.count)


def table(found: Sequence[Measured], along_axis: Callable[[Sequence[Measured]], Axis]) -> str:
    """Format a Markdown table with a line for each length, or number of loops."""
    name, along, place = along_axis(found)
    steps = {(each.variant, each.checkpoint_chunks, place(each)): each for each in along}
    columns = (PHASE_1, "the LoopLM's rows", PHASE_2)
    head = [name, *(f"{what}{', checkpointed' * recomputed}" for recomputed in (True, False) for what in columns)]
    lines = [head]
    for where in sorted({place(each) for each in along}):
        cells = [f"{where:,}"]
        for recomputed in (True, False):
            one, two, without = (steps[variant, recomputed, where] for variant in (PHASE_1, PHASE_2, WITHOUT))
            cells += [
                megabytes(one.peak, one.planned),
                megabytes(one.peak - without.peak, one.planned - without.planned),
                megabytes(two.peak, two.planned),
            ]
        lines.append(cells)
    return markdown_table(lines)


def megabytes(measured: int, planned: int) -> str:
    """Format measured and planned bytes as `M (P)` megabytes."""
    return f"{measured / 1e6:.1f} ({planned / 1e6:.1f})"


def plot(found: Sequence[Measured]) -> "Figure":
    """Draw peaks as dots on lines, what is planned dashed; a column for tokens and one for loops."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    for panels, recomputed in zip(figure.subplots(2, 2, sharey="row"), (True, False), strict=True):
        for axes, axis in zip(panels, (by_length, by_loops), strict=True):
            name, along, place = axis(found)
            lines = {}
            for variant, color in ((PHASE_1, "C0"), (PHASE_2, "C1"), (WITHOUT, "C2")):
                steps = sorted(
                    (each for each in along if (each.variant, each.checkpoint_chunks) == (variant, recomputed)),
                    key=place,
                )
                where = [place(each) for each in steps]
                lines[variant] = [each.peak / 1e6 for each in steps]
                axes.plot(where, lines[variant], "o-", color=color, ms=4, label=variant)
                axes.plot(where, [each.planned / 1e6 for each in steps], "--", color=color, lw=1)
            axes.fill_between(
                where, lines[WITHOUT], lines[PHASE_1], color="C0", alpha=0.15, label="the LoopLM's rows of phase 1"
            )
            axes.set(xlabel=name, xticks=where, ylim=(0, None))
            axes.set_title("with checkpoint_chunks" if recomputed else "without checkpoint_chunks", fontsize=10)
            axes.tick_params(axis="x", rotation=45)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("peak MB of a step (dashed: planned)")
    figure.axes[0].legend(fontsize=8)
    return figure
