"""What studies and trials share: a file of one JSON record a finished run, the words they are asked with, reports."""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from melt_serve.train.atomic import replacing
from melt_serve.train.commands import add_minutes
from melt_serve.train.session import StudyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Record = dict[str, Any]
"""What came out of one run, as JSON; its `settings` tell it from other runs."""


@dataclass(frozen=True)
class WantedRun:
    """A run that a study wants to have a record of.

    Attributes:
        title: for the progress bar.
        settings: what makes the run the run it is: of records with the same settings one is enough.
        run: does it, with its states in the folder it is given, and removes that folder; gives the record.
    """

    title: str
    settings: Record
    run: Callable[[Path], Record]


def add_study_flags(
    command: argparse.ArgumentParser, what: str, folder: Path, seeds_by_default: tuple[int, ...]
) -> None:
    """Add the flags that all studies have.

    Args:
        what: --list shows, in words.
        folder: see `add_records`.
    """
    add = command.add_argument
    add("--list", action="store_true", help=f"show {what}, finished runs and estimated minutes; run nothing")
    add(
        "--report",
        type=Path,
        metavar="FILE.md",
        help="write FILE.md, FILE.svg and FILE.json of what is done; run nothing",
    )
    shown = ",".join(map(str, seeds_by_default))
    add("--seeds", type=seeds, default=seeds_by_default, metavar="S,...", help=f"one run each (default: {shown})")
    add_records(command, folder)
    add_minutes(command, math.inf)


def add_records(command: argparse.ArgumentParser, folder: Path) -> None:
    """Add the flag that names the file of results.

    Args:
        folder: where it lies by default, as `records.jsonl`, or as `rows.jsonl` if an older version began one there.
    """
    default, before = folder / "records.jsonl", folder / "rows.jsonl"
    if before.exists() and not default.exists():
        default = before
    command.add_argument(
        "--records", "--rows", type=Path, default=default, metavar="FILE", help=f"file of results (default: {default})"
    )


def names(text: str) -> tuple[str, ...]:
    """Parse names with commas between them, such as `full,no-chunks`."""
    return tuple(text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    """Parse seeds with commas between them, such as `0,1`."""
    return tuple(int(each) for each in text.split(","))


def run_missing(wanted: Sequence[WantedRun], path: Path) -> None:
    """Do the runs that are not in the file yet, in their order, and append each record when it is there."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    done = [record["settings"] for record in read_records(path)]
    todo = []
    for each in wanted:
        if each.settings not in done:
            done.append(each.settings)
            todo.append(each)
    if not todo:
        print(f"all {len(wanted)} runs are in {path}", file=sys.stderr)
        return
    with tqdm(total=len(todo), desc="runs", unit="run", dynamic_ncols=True) as bar:
        for each in todo:
            bar.set_description(each.title)
            append_record(path, each.run(path.parent / fingerprint(each.settings)))
            bar.update()


def read_records(path: Path) -> list[Record]:
    """Read the records of the runs that are done; none where there is no file.

    Raises:
        StudyError: a line is broken.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise StudyError(f"{path}, line {number}, is not JSON; mend or remove it") from None
    return records


def append_record(path: Path, record: Record) -> None:
    """Add one record; the file is replaced whole, so that no crash leaves half a line."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with replacing(path) as part:
        part.write_text(before + json.dumps(record) + "\n", encoding="utf-8")


def fingerprint(settings: Record) -> str:
    """Name a folder for the states of a run with these settings."""
    return f"run-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"


def check_report(path: Path) -> None:
    """Find out, before minutes of work, whether a report can be written.

    Raises:
        OSError: no matplotlib, or no such folder.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OSError("--report needs matplotlib: pip install matplotlib") from None
    if not path.parent.is_dir() or path.suffix != ".md":
        raise OSError(f"--report {path}: name a file that ends in .md, in a folder that is there")


def write_report(
    path: Path, introduction: str, caption: str, figure: "Figure", sections: Sequence[str], records: Sequence[Record]
) -> list[Path]:
    """Write a report as Markdown, and beside it its figure (.svg) and the records it is of (.json).

    Args:
        path: see `check_report`.
        caption: says what the figure shows; the figure stands between introduction and sections.

    Returns:
        The three files.
    """
    files = [path, path.with_suffix(".svg"), path.with_suffix(".json")]
    parts = (introduction, f"![{caption}]({files[1].name})", *sections)
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    figure.savefig(files[1])
    lines = ",\n".join(json.dumps(record) for record in records)
    files[2].write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return files


def spread(values: Sequence[float], form: str) -> str:
    """Format the mean, and the lowest and the highest where there are several."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells as Markdown, the first as the head."""
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|---" * len(lines[0]) + "|")
    return "\n".join(text)
