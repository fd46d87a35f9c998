"""What a run tells in its folder: losses.jsonl, a line a step; evaluations.jsonl; a plot of every part of the loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melt_serve.train.atomic import replacing

LOG = "losses.jsonl"
EVALUATIONS = "evaluations.jsonl"
PLOT = "losses.svg"
NOT_LOSSES = (
    "stage",
    "step",
    "seconds",
    "skipped",
    "learning_rate",
    "alpha",
    "loops_asked",
    "chunk_size",
    "tokens_per_second",
    "flops_per_second",
    "arithmetic_share",
)


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
    parts = parts_of(entries)
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


def parts_of(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Name the parts of the loss that these steps have, and their gradient's norm; those of every loop left out."""
    numbers = dict.fromkeys(key for entry in entries for key in entry if not isinstance(entry[key], list))
    return [part for part in numbers if part not in NOT_LOSSES]


def listed(value: Any) -> list[Any]:
    """Return a list as it is, and a number as a list of one."""
    return value if isinstance(value, list) else [value]


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


def minutes_trained(log: list[dict]) -> float:
    """Add up the minutes that all steps took, over all sessions."""
    return sum(entry["seconds"] for entry in log) / 60
