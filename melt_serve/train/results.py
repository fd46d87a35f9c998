"""What studies share: a file of one JSON row a finished run, the words they are asked with, and tables of rows."""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from melt_serve.terminal import fail
from melt_serve.train.session import StudyError

if TYPE_CHECKING:
    from melt_serve.train.session import Session


Row = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A run that is wanted.

    Attributes:
        title: for the progress bar.
        settings: what makes the run the run it is: of rows with the same settings one is enough.
        run: does it, with its states in the folder it is given, and removes that folder; gives the row.
    """

    title: str
    settings: Row
    run: Callable[[Path], Row]


def add_study_flags(command: argparse.ArgumentParser, what: str, rows: Path, seeds_by_default: tuple[int, ...]) -> None:
    """The flags that all studies have.

    Args:
        what: --list shows, in words.
        rows: the file of results, by default.
    """
    add = command.add_argument
    add("--list", action="store_true", help=f"show {what}, rows there are and estimated minutes; run nothing")
    add("--report", type=Path, metavar="FILE.md", help="write FILE.md, FILE.svg and FILE.json of the rows; run nothing")
    shown = ",".join(map(str, seeds_by_default))
    add("--seeds", type=seeds, default=seeds_by_default, metavar="S,...", help=f"one run each (default: {shown})")
    add("--rows", type=Path, default=rows, help=f"file of results (default: {rows})")
    add("--minutes", type=minutes, default=math.inf, metavar="M", help="save and stop after M minutes")


def words(text: str) -> tuple[str, ...]:
    """`a,b` as it was meant."""
    return tuple(text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    """`0,1` as numbers."""
    return tuple(int(each) for each in text.split(","))


def minutes(text: str) -> float:
    """A time that can be waited for."""
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, but is {text}")
    return value


def exit_code(work: Callable[["Session"], None], minutes: float) -> int:
    """Do a command's work in a session of so many minutes, and say in one line how it ended if it is not done."""
    from melt_serve.train.session import Paused, Session, TrainingError

    session = Session(minutes)
    again = "the same command goes on"
    try:
        work(session)
    except Paused:
        print(f"paused, everything is saved; {again}", file=sys.stderr)
        return 3 if session.signal is None else 128 + session.signal
    except KeyboardInterrupt:
        print(f"\nstopped, finished runs are saved; {again}", file=sys.stderr)
        return 130
    except (StudyError, OSError, TrainingError) as error:
        return fail(error, "melt_serve.train")
    return 0


def run_missing(planned: Sequence[Planned], path: Path) -> None:
    """Do the runs that are not in the file yet, in their order, and append each when it is done."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    done = [row["settings"] for row in read_rows(path)]
    todo = []
    for each in planned:
        if each.settings not in done:
            done.append(each.settings)
            todo.append(each)
    if not todo:
        print(f"all {len(planned)} runs are in {path}", file=sys.stderr)
        return
    with tqdm(total=len(todo), desc="runs", unit="run", dynamic_ncols=True) as bar:
        for each in todo:
            bar.set_description(each.title)
            append_row(path, each.run(path.parent / fingerprint(each.settings)))
            bar.update()


def read_rows(path: Path) -> list[Row]:
    """The runs that are done.

    Raises:
        StudyError: a line is broken.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise StudyError(f"{path}, line {number}, is not JSON; mend or remove it") from None
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add one run; the file is replaced whole, so that no crash leaves half a line."""
    part = path.with_name(f".{path.name}.partial")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    part.write_text(before + json.dumps(row) + "\n", encoding="utf-8")
    os.replace(part, path)


def fingerprint(settings: Row) -> str:
    """A folder's name for the states of a run with these settings."""
    return f"run-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """The rows a report is of, one a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the lowest and the highest where there are several."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as Markdown, the first the head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    rows.insert(1, "|---" * len(lines[0]) + "|")
    return "\n".join(rows)
