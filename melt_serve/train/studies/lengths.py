"""`python -m melt_serve.train lengths`: whether rows that carry T loops of work help where words are long."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.terminal import positive
from melt_serve.train.results import (
    Planned,
    Row,
    add_study_flags,
    exit_code,
    fingerprint,
    read_rows,
    run_missing,
    words,
)
from melt_serve.train.session import StudyError

if TYPE_CHECKING:
    from melt_serve.train.session import Session
    from melt_serve.train.studies.length_run import Curriculum, ModelUnderTest


ROWS = Path("runs/lengths/rows.jsonl")
DESCRIPTION = """\
A finished MELT row carries T loops of work to every later token, so a MELT is recurrent along the sequence, once a
chunk, where a LoopLM is not. Train LoopLM, MELT at several C, and a plain transformer of equal compute from nothing on
word problems, with the same words in the same order, and ask each about words up to four times as long. --list shows
tasks and models.

Every run is appended to --rows as one line of JSON when it is measured, and a run that is there is not repeated: a
study may take many sessions. Ctrl-C, SIGTERM or --minutes saves the run at work after its current step; the same
command goes on with it.

Exit codes: 0 done, 1 an error, 2 wrong words, 3 --minutes are over, 130 Ctrl-C, 143 SIGTERM."""
EXAMPLES = """\
examples:
  python -m melt_serve.train lengths --list                      what there is, what is done, how long it takes
  python -m melt_serve.train lengths --tasks s3 --minutes 20     twenty minutes of one task
  python -m melt_serve.train lengths --models looplm,melt-1 --seeds 0,1,2
  python -m melt_serve.train lengths --report lengths.md         tables, curves and JSON of all that is done
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `lengths` to the commands of `python -m melt_serve.train`."""
    command = commands.add_parser(
        "lengths",
        help="measure accuracy against length: LoopLM, MELT at several C, a plain transformer",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run_command=lengths)
    add = command.add_argument
    add("--tasks", type=words, metavar="T,...", help="only these (default: all)")
    add("--models", type=words, metavar="M,...", help="only these (default: all)")
    add("--steps", type=positive, metavar="N", help="steps of training (default: as in --list)")
    add_study_flags(command, "tasks, models", ROWS, (0,))


def lengths(arguments: argparse.Namespace) -> int:
    """Run, list or report what the command line asks for; the exit code."""
    return exit_code(lambda session: carry_out(arguments, session), arguments.minutes)


def carry_out(arguments: argparse.Namespace, session: "Session") -> None:
    """What is asked for, in one session.

    Raises:
        StudyError: see `choose`, `read_rows` and `write_report`.
        Paused, TrainingError: see `run_stage`.
    """
    tasks, models, curriculum = choose(arguments.tasks, arguments.models, arguments.steps)
    rows = read_rows(arguments.rows)
    if arguments.list:
        print(listing(tasks, models, curriculum, arguments.seeds, rows))
    elif arguments.report:
        from melt_serve.train.studies.lengths_report import write_report

        for path in write_report(arguments.report, tasks, models, curriculum, rows):
            print(f"wrote {path}")
    else:
        run_all(tasks, models, curriculum, arguments.seeds, arguments.rows, session)


def choose(
    tasks: Sequence[str] | None, models: Sequence[str] | None, steps: int | None
) -> tuple[Sequence[str], Sequence["ModelUnderTest"], "Curriculum"]:
    """The tasks by name, the models and the curriculum asked for, by default all and the usual one.

    Raises:
        StudyError: one of them does not exist.
    """
    from melt_serve.train.studies.length_run import CURRICULUM, MODELS_UNDER_TEST
    from melt_serve.train.studies.word_problems import PROBLEMS

    for kind, given, right in (("task", tasks, list(PROBLEMS)), ("model", models, list(MODELS_UNDER_TEST))):
        if wrong := [each for each in given or () if each not in right]:
            raise StudyError(f"there is no {kind} {wrong[0]!r}, only {', '.join(right)}")
    curriculum = replace(CURRICULUM, steps=steps or CURRICULUM.steps)
    return tasks or list(PROBLEMS), [MODELS_UNDER_TEST[name] for name in models or MODELS_UNDER_TEST], curriculum


def run_all(
    tasks: Sequence[str],
    models: Sequence["ModelUnderTest"],
    curriculum: "Curriculum",
    seeds: Sequence[int],
    path: Path,
    session: "Session",
) -> None:
    """Run what is not in the file yet: a seed's tasks one after another, each with all models.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    from melt_serve.train.studies.length_run import run, settings

    planned = [
        Planned(
            f"{task}, {model.name}, seed {seed}",
            settings(model, task, curriculum, seed),
            partial(run, model, task, curriculum, seed, session=session),
        )
        for seed in seeds
        for task in tasks
        for model in models
    ]
    run_missing(planned, path)


def listing(
    tasks: Sequence[str],
    models: Sequence["ModelUnderTest"],
    curriculum: "Curriculum",
    seeds: Sequence[int],
    rows: Sequence[Row],
) -> str:
    """Tasks and models in columns, with the runs that are done and the minutes that are left."""
    from melt_serve.terminal import columns
    from melt_serve.train.studies.length_run import settings
    from melt_serve.train.studies.word_problems import PROBLEMS

    done = {fingerprint(row["settings"]): row["seconds"] / 60 for row in rows}
    lines, left, taken = [("task", "model", "done", "minutes", "what")], 0, list(done.values())
    for task in tasks:
        for model in models:
            ran = [done[key] for seed in seeds if (key := fingerprint(settings(model, task, curriculum, seed))) in done]
            left += len(seeds) - len(ran)
            spent = f"{sum(ran):.1f}" if ran else "-"
            lines.append((task, model.name, f"{len(ran)} of {len(seeds)}", spent, model.what))
    each = sum(taken) / len(taken) if taken else MINUTES
    what = "\n".join(f"{task}: {PROBLEMS[task].what}" for task in tasks)
    to_go = f"{curriculum.steps} steps; about {each:.1f} minutes a run, {left * each:.0f} minutes to go"
    return f"{what}\n\n{columns(lines)}\n\n{to_go}"


MINUTES = 3.0
"""That a run took in the mean with one thread on 2 CPU cores, for `--list` before there are rows."""
