"""What a run tells: losses.jsonl, a line a step; the same in TensorBoard; and a plot of every part."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from melt_serve.train.atomic import replacing
from melt_serve.train.loop.distributed import rank

LOG = "losses.jsonl"
PLOT = "losses.svg"
NOT_LOSSES = ("stage", "step", "seconds")


@contextmanager
def board(folder: Path, name: str, step: int) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Show numbers of a stage by step in TensorBoard, where it is installed; points from `step` on are drawn anew."""
    if rank() > 0 or find_spec("tensorboard") is None:
        yield lambda numbers, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / name), purge_step=step) as writer:

        def show(numbers: dict[str, float], step: int) -> None:
            for part, value in numbers.items():
                writer.add_scalar(part, value, step)

        yield show


def plot_losses(folder: Path) -> Path | None:
    """Draw every part of the loss over all steps; return the picture's path, None without matplotlib or steps."""
    entries = read_log(folder / LOG)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not entries:
        return None
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    parts = [part for part in dict.fromkeys(key for entry in entries for key in entry) if part not in NOT_LOSSES]
    figure = Figure(figsize=(8, 2.2 * len(parts)), layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        first = 0
        for stage in stages:
            steps = [entry for entry in entries if entry["stage"] == stage]
            points = [(first + entry["step"], entry[part]) for entry in steps if part in entry]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=0.8, label=stage)
            first += len(steps)
        axes.set_ylabel(part.replace("_", " "))
        if all(entry.get(part, 1) > 0 for entry in entries):
            axes.set_yscale("log")
        axes.set_xlim(0, len(entries))
        axes.legend(fontsize="small")
    axes.set_xlabel("step")
    with replacing(folder / PLOT) as part_file:
        figure.savefig(part_file, format="svg")
    return folder / PLOT


def read_log(log: Path) -> list[dict]:
    """Read the whole lines of a log, in order."""
    entries = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:  # torn by kill -9
            continue
    return entries


def forget_after(log: Path, name: str, step: int) -> None:
    """Drop the log lines of steps that a resumed run will repeat."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if keep_line(line, name, step)]
    if kept != lines:
        with replacing(log) as part:
            part.write_text("".join(kept), encoding="utf-8")


def keep_line(line: str, name: str, step: int) -> bool:
    """Tell whether a log line is whole and not one of the steps to come."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return entry["stage"] != name or entry["step"] < step


def minutes_trained(log: Path) -> float:
    """Add up the minutes that all steps took, over all sessions."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["seconds"] for line in lines) / 60
