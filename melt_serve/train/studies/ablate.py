"""`python -m melt_serve.train ablate`: which part of the recipe, and of the gate, is worth its price."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.terminal import columns
from melt_serve.train.commands import Commands, new_command, run_session
from melt_serve.train.results import Record, WantedRun, add_study_flags, names, read_records, run_missing
from melt_serve.train.session import Session, StudyError

if TYPE_CHECKING:
    from melt_serve.train.studies.ablations import Size, Variant


FOLDER = Path("runs/ablate")
DESCRIPTION = """\
Post-train the bundled LoopLM in many ways and hold the outcomes side by side: the paper's ablations of the recipe and
of the gate, chunk sizes, and cheaper gates. --list shows the studies with their variants.

Every run is appended to --records as one line of JSON when it is measured, and a run that is there is not repeated: a
study may take many sessions. Ctrl-C, SIGTERM or --minutes saves the run at work after its current step; the same
command goes on with it.

Exit codes: 0 done, 1 an error, 2 wrong words, 3 --minutes are over, 130 Ctrl-C, 143 SIGTERM."""
EXAMPLES = """\
examples:
  python -m melt_serve.train ablate --list                       what there is, what is done, how long it takes
  python -m melt_serve.train ablate gates --seeds 0 --minutes 60 an hour of one study with one seed
  python -m melt_serve.train ablate recipe --variants full,no-chunks
  python -m melt_serve.train ablate --report ablations.md        tables, plot and JSON of all that is done
"""


def add_command(commands: Commands) -> None:
    """Add `ablate` to the commands of `python -m melt_serve.train`."""
    help = "measure what each part of the recipe and of the gate is worth"
    command = new_command(commands, "ablate", ablate, help, DESCRIPTION, EXAMPLES)
    add = command.add_argument
    add("studies", metavar="STUDY", nargs="*", help="studies to run, in this order (default: all)")
    add("--size", default="small", help="small, or demo: that of the bundled recipe (default: small)")
    add("--variants", type=names, metavar="V,...", help="only these of the studies")
    add_study_flags(command, "studies, variants", FOLDER, (0, 1, 2))


def ablate(arguments: argparse.Namespace) -> int:
    """Run, list or report what the command line asks for; return the exit code."""
    return run_session(lambda session: carry_out(arguments, session), arguments.minutes)


def carry_out(arguments: argparse.Namespace, session: Session) -> None:
    """Do what is asked for, in one session.

    Raises:
        StudyError: see `choose`, `read_records` and `write_ablation_report`.
        OSError: the report cannot be written.
        Paused, TrainingError: see `run_stage`.
    """
    size, chosen = choose(arguments.studies, arguments.variants, arguments.size)
    records = read_records(arguments.records)
    if arguments.list:
        print(listing(chosen, size, arguments.seeds, records))
    elif arguments.report:
        from melt_serve.train.studies.ablation_report import write_ablation_report

        for path in write_ablation_report(arguments.report, chosen, size, records):
            print(f"wrote {path}")
    else:
        run_all(chosen, size, arguments.seeds, arguments.records, session)


def choose(
    names: Sequence[str], variants: Sequence[str] | None, size: str
) -> tuple["Size", dict[str, tuple["Variant", ...]]]:
    """Return the size, and the studies by name, each with the variants asked for.

    Raises:
        StudyError: one of them does not exist.
    """
    from melt_serve.train.studies.ablations import SIZES, STUDIES

    known = {variant.name for study in STUDIES.values() for variant in study}
    for kind, given, right in (
        ("study", names, STUDIES),
        ("variant", variants or (), known),
        ("size", (size,), SIZES),
    ):
        if wrong := [each for each in given if each not in right]:
            raise StudyError(f"there is no {kind} {wrong[0]!r}, only {', '.join(right)}")
    chosen = {name: STUDIES[name] for name in (names or STUDIES)}
    if variants:
        chosen = {name: tuple(each for each in study if each.name in variants) for name, study in chosen.items()}
    return SIZES[size], {name: study for name, study in chosen.items() if study}


def run_all(
    studies: dict[str, tuple["Variant", ...]], size: "Size", seeds: Sequence[int], path: Path, session: Session
) -> None:
    """Run what is not in the file yet: all variants with the first seed, then with the next.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    from melt_serve.train.studies.ablation_run import AblationRunner, settings

    runner = AblationRunner()
    wanted = [
        WantedRun(
            f"{variant.name}, seed {seed}",
            settings(variant, size, seed),
            partial(runner.run, variant, size, seed, session=session),
        )
        for seed in seeds
        for study in studies.values()
        for variant in study
        if seed in variant.seeds(seeds)
    ]
    run_missing(wanted, path)


def listing(
    studies: dict[str, tuple["Variant", ...]], size: "Size", seeds: Sequence[int], records: Sequence[Record]
) -> str:
    """Format studies and variants in columns, with the runs that are done and the minutes that are left."""
    from melt_serve.train.studies.ablation_run import settings

    taken = [record["seconds"] / 60 for record in records if record["size"] == size.name]
    each = sum(taken) / len(taken) if taken else size.minutes
    done = [record["settings"] for record in records]
    lines, left = [("study", "variant", "done", "what")], 0
    for name, study in studies.items():
        for variant in study:
            wanted = variant.seeds(seeds)
            ran = sum(settings(variant, size, seed) in done for seed in wanted)
            left += len(wanted) - ran
            lines.append((name, variant.name, f"{ran} of {len(wanted)}", variant.what))
    return f"{columns(lines)}\n\nsize {size.name}: about {each:.1f} minutes a run, {left * each:.0f} minutes to go"
