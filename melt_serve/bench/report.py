"""What every measurement's table and figure share. Figures need matplotlib, which is optional."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from melt_serve.bench.engine import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def spread(rounds: Sequence[float], digits: int = 2, unit: str = "x") -> tuple[str, str, str]:
    """Return a table's cells for what was measured in every round: the median, the least and the most."""
    return f"{median(rounds):.{digits}f}{unit}", f"{min(rounds):.{digits}f}", f"{max(rounds):.{digits}f}"


def judged(goal: float | None, value: float, at_most: bool = False) -> str:
    """Return a table's cell for a goal, with whether the value reaches it.

    Args:
        goal: what the value should be at least; None if there is none.
        at_most: the goal is the most that the value should be.
    """
    if goal is None:
        return "-"
    return f"{goal:.2f} {verdict(value <= goal if at_most else value >= goal)}"


def verdict(reached: bool) -> str:
    """Return what became of a goal, in a word."""
    return "reached" if reached else "missed"


def refuse_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before minutes of measuring.

    Raises:
        BenchError: no matplotlib, no such folder, or a kind of file it does not write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise BenchError(f"--plot {path} needs matplotlib: pip install matplotlib") from None
    if not path.parent.is_dir():
        raise BenchError(f"--plot {path}: {path.parent} is not a folder")
    if path.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise BenchError(f"--plot {path}: name a file that ends in .png, .svg or .pdf")


def set_loop_axis(axes: "Axes", title: str, loops: Sequence[int]) -> None:
    """Prepare axes whose x are loops, each twice the one before or so."""
    axes.set(title=title, xlabel="loops T")
    axes.set_xscale("log", base=2)
    axes.set_xticks(loops, [str(each) for each in loops])
    axes.grid(alpha=0.3)


def draw_spread(
    axes: "Axes", loops: Sequence[int], rounds: Sequence[Sequence[float]], label: str | None = None
) -> None:
    """Draw a line through the median of the rounds at each depth, with bars from the least to the most."""
    medians = [median(each) for each in rounds]
    below = [middle - min(each) for middle, each in zip(medians, rounds, strict=True)]
    above = [max(each) - middle for middle, each in zip(medians, rounds, strict=True)]
    axes.errorbar(loops, medians, yerr=(below, above), marker="o", capsize=4, label=label)
