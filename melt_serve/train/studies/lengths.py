"""`python -m melt_serve.train lengths`: whether rows that carry T loops of work help where words are long."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.terminal import columns, positive
from melt_serve.train.commands import Commands, new_command, run_session
from melt_serve.train.results import (
    Record,
    WantedRun,
    add_study_flags,
    fingerprint,
    names,
    read_records,
    run_missing,
)
from melt_serve.train.session import Session, StudyError

if TYPE_CHECKING:
    from melt_serve.train.studies.length_run import Curriculum, ModelUnderTest


FOLDER = Path("runs/lengths")
MINUTES = 3.0
"""That a run took in the mean with one thread on 2 CPU cores, for `--list` before any is done."""
DESCRIPTION = """\
A finished MELT row carries T loops of work to every later token, so a MELT is recurrent along the sequence, once a
chunk, where a LoopLM is not. Train LoopLM, MELT at several C, and a plain transformer of equal compute from nothing on
word problems, with the same words in the same order, and ask each about words up to four times as long. --list shows
tasks and models.

Every run is appended to --records as one line of JSON when it is measured, and a run that is there is not repeated: a
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


def add_command(commands: Commands) -> None:
    """Add `lengths` to the commands of `python -m melt_serve.train`."""
    help = "measure accuracy against length: LoopLM, MELT at several C, a plain transformer"
    command = new_command(commands, "lengths", lengths, help, DESCRIPTION, EXAMPLES)
    add = command.add_argument
    add("--tasks", type=names, metavar="T,...", help="only these (default: all)")
    add("--models", type=names, metavar="M,...", help="only these (default: all)")
    add("--steps", type=positive, metavar="N", help="steps of training (default: as in --list)")
    add_study_flags(command, "tasks, models", FOLDER, (0,))


def lengths(arguments: argparse.Namespace) -> int:
    """Run, list or report what the command line asks for; return the exit code."""
    return run_session(lambda session: carry_out(arguments, session), arguments.minutes)


def carry_out(arguments: argparse.Namespace, session: Session) -> None:
    """Do what is asked for, in one session.

    Raises:
        StudyError: see `choose`, `read_records` and `write_lengths_report`.
        OSError: the report cannot be written.
        Paused, TrainingError: see `run_stage`.
    """
    tasks, models, curriculum = choose(arguments.tasks, arguments.models, arguments.steps)
    records = read_records(arguments.records)
    if arguments.list:
        print(listing(tasks, models, curriculum, arguments.seeds, records))
    elif arguments.report:
        from melt_serve.train.studies.lengths_report import write_lengths_report

        for path in write_lengths_report(arguments.report, tasks, models, curriculum, records):
            print(f"wrote {path}")
    else:
        run_all(tasks, models, curriculum, arguments.seeds, arguments.records, session)


def choose(
    tasks: Sequence[str] | None, models: Sequence[str] | None, steps: int | None
) -> tuple[Sequence[str], Sequence["ModelUnderTest"], "Curriculum"]:
    """Return the tasks by name, the models and the curriculum asked for, by default all and the usual one.

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
    session: Session,
) -> None:
    """Run what is not in the file yet: a seed's tasks one after another, each with all models.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    from melt_serve.train.studies.length_run import run, settings

    wanted = [
        WantedRun(
            f"{task}, {model.name}, seed {seed}",
            settings(model, task, curriculum, seed),
            partial(run, model, task, curriculum, seed, session=session),
        )
        for seed in seeds
        for task in tasks
        for model in models
    ]
    run_missing(wanted, path)


def listing(
    tasks: Sequence[str],
    models: Sequence["ModelUnderTest"],
    curriculum: "Curriculum",
    seeds: Sequence[int],
    records: Sequence[Record],
) -> str:
    """Format tasks and models in columns, with the runs that are done and the minutes that are left."""
    from melt_serve.train.studies.length_run import settings
    from melt_serve.train.studies.word_problems import PROBLEMS

    done = {fingerprint(record["settings"]): record["seconds"] / 60 for record in records}
    lines, left = [("task", "model", "done", "minutes", "what")], 0
    for task in tasks:
        for model in models:
            ran = [done[key] for seed in seeds if (key := fingerprint(settings(model, task, curriculum, seed))) in done]
            left += len(seeds) - len(ran)
            spent = f"{sum(ran):.1f}" if ran else "-"
            lines.append((task, model.name, f"{len(ran)} of {len(seeds)}", spent, model.what))
    each = sum(done.values()) / len(done) if done else MINUTES
    what = "\n".join(f"{task}: {PROBLEMS[task].what}" for task in tasks)
    to_go = f"{curriculum.steps} steps; about {each:.1f} minutes a run, {left * each:.0f} minutes to go"
    return f"{what}\n\n{columns(lines)}\n\n{to_go}"
