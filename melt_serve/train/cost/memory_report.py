"""The memory of training steps as Markdown, plot and JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from melt_serve.train.cost.step_memory import PHASE_1, PHASE_2, WITHOUT, Measured
from melt_serve.train.recipe import PostTraining
from melt_serve.train.results import markdown_table, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Axis = tuple[str, list[Measured], Callable[[Measured], int]]
"""What grows, the steps that differ in it alone, and how much a step has of it."""
INTRODUCTION = """\
# Memory of a training step

Written by `python -m melt_serve.train memory`; read in README.md, "Memory". One step, forward and backward, of
{sequences} with C = {chunk}: `{recipe}` at 1/{scale} of its width, two layers, {dtype}, {device}. MB are 10^6
bytes, weights not counted; in brackets what `plan` says.

- **the LoopLM's rows**: phase 1 less the same step with MELT's rows alone.
- **checkpointed**: with `checkpoint_chunks`, a chunk's loops run again in the backward pass.
"""


def refuse_report(path: Path) -> None:
    """Say before minutes of measuring that a report could not be written.

    Raises:
        OSError: no matplotlib, or no such folder.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OSError("--report needs matplotlib: pip install matplotlib") from None
    if not path.parent.is_dir() or path.suffix != ".md":
        raise OSError(f"--report {path}: name a file that ends in .md, in a folder that is there")


def write_report(path: Path, found: Sequence[Measured], recipe: PostTraining, name: str, scale: int) -> list[Path]:
    """Write `path`, and a plot and JSON beside it; gives all three."""
    cuda = torch.cuda.is_available()
    files = [path, path.with_suffix(".svg"), path.with_suffix(".json")]
    introduction = INTRODUCTION.format(
        sequences="one sequence" if recipe.micro_batch == 1 else f"{recipe.micro_batch} sequences",
        chunk=recipe.chunk_size,
        recipe=name,
        scale=scale,
        dtype=recipe.dtype,
        device=torch.cuda.get_device_name() if cuda else f"CPU, torch {torch.__version__}",
    )
    picture = f"![peak memory by tokens and loops]({files[1].name})"
    parts = (introduction, picture, table(found, by_length), table(found, by_loops))
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    plot(found).savefig(files[1])
    write_json(files[2], [asdict(each) for each in found])
    return files


def by_length(found: Sequence[Measured]) -> Axis:
    """Those that differ in length alone: what grows, they, and their place."""
    usual = most_common([each.loops for each in found])
    return f"tokens, T = {usual}", [each for each in found if each.loops == usual], lambda each: each.length


def by_loops(found: Sequence[Measured]) -> Axis:
    """Those that differ in loops alone."""
    usual = most_common([each.length for each in found])
    return f"loops, {usual:,} tokens", [each for each in found if each.length == usual], lambda each: each.loops


def most_common(values: Sequence[int]) -> int:
    """The value that is there most often."""
    return max(values, key=values.count)


def table(found: Sequence[Measured], along_axis: Callable[[Sequence[Measured]], Axis]) -> str:
    """Markdown: a line for each length, or number of loops."""
    name, along, place = along_axis(found)
    steps = {(each.variant, each.checkpoint_chunks, place(each)): each for each in along}
    columns = (PHASE_1, "the LoopLM's rows", PHASE_2)
    head = [name, *(f"{what}{', checkpointed' * again}" for again in (True, False) for what in columns)]
    lines = [head]
    for where in sorted({place(each) for each in along}):
        cells = [f"{where:,}"]
        for again in (True, False):
            one, two, without = (steps[variant, again, where] for variant in (PHASE_1, PHASE_2, WITHOUT))
            cells += [
                megabytes(one.peak, one.planned),
                megabytes(one.peak - without.peak, one.planned - without.planned),
                megabytes(two.peak, two.planned),
            ]
        lines.append(cells)
    return markdown_table(lines)


def megabytes(measured: int, planned: int) -> str:
    """A cell."""
    return f"{measured / 1e6:.1f} ({planned / 1e6:.1f})"


def plot(found: Sequence[Measured]) -> "Figure":
    """Peaks as dots on lines, what is planned dashed; a column for tokens and one for loops."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    for row, again in zip(figure.subplots(2, 2, sharey="row"), (True, False), strict=True):
        for axes, axis in zip(row, (by_length, by_loops), strict=True):
            name, along, place = axis(found)
            lines = {}
            for variant, color in ((PHASE_1, "C0"), (PHASE_2, "C1"), (WITHOUT, "C2")):
                steps = sorted(
                    (each for each in along if (each.variant, each.checkpoint_chunks) == (variant, again)), key=place
                )
                where = [place(each) for each in steps]
                lines[variant] = [each.peak / 1e6 for each in steps]
                axes.plot(where, lines[variant], "o-", color=color, ms=4, label=variant)
                axes.plot(where, [each.planned / 1e6 for each in steps], "--", color=color, lw=1)
            axes.fill_between(
                where, lines[WITHOUT], lines[PHASE_1], color="C0", alpha=0.15, label="the LoopLM's rows of phase 1"
            )
            axes.set(xlabel=name, xticks=where, ylim=(0, None))
            axes.set_title("with checkpoint_chunks" if again else "without checkpoint_chunks", fontsize=10)
            axes.tick_params(axis="x", rotation=45)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("peak MB of a step (dashed: planned)")
    figure.axes[0].legend(fontsize=8)
    return figure
