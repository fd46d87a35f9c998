"""Plots to files. matplotlib is optional: `pip install matplotlib`."""

from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.bench.engine import BenchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def refuse_plot(path: Path) -> None:
    """Say before minutes of measuring that a plot could not be written.

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


def write(figure: "Figure", path: Path) -> None:
    """Write the figure in the format its path names."""
    figure.savefig(path, dpi=150)
