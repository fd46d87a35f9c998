"""`python -m melt_serve.train ablate`: which part of the recipe, and of the gate, is worth its price."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.train.results import Planned, Row, add_study_flags, exit_code, read_rows, run_missing, words
from melt_serve.train.session import StudyError

if TYPE_CHECKING:
    from melt_serve.train.session import Session
    from melt_serve.train.studies.ablations import Size, Variant


ROWS = Path("runs/ablate/rows.jsonl")
DESCRIPTION = """\
Post-train the bundled LoopLM in many ways and hold the outcomes side by side: the paper's ablations of the recipe and
of the gate, chunk sizes, and cheaper gates. --list shows the studies with their variants.

Every run is appended to --rows as one line of JSON when it is measured, and a run that is there is not repeated: a
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


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ablate` to the commands of `python -m melt_serve.train`."""
    command = commands.add_parser(
        "ablate",
        help="measure what each part of the recipe and of the gate is worth",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run_command=ablate)
    add = command.add_argument
    add("studies", metavar="STUDY", nargs="*", help="studies to run, in this order (default: all)")
    add("--size", default="small", help="small, or demo: that of the bundled recipe (default: small)")
    add("--variants", type=words, metavar="V,...", help="only these of the studies")
    add_study_flags(command, "studies, variants", ROWS, (0, 1, 2))


def ablate(arguments: argparse.Namespace) -> int:
    """Run, list or report what the command line asks for; the exit code."""
    return exit_code(lambda session: carry_out(arguments, session), arguments.minutes)


def carry_out(arguments: argparse.Namespace, session: "Session") -> None:
    """What is asked for, in one session.

    Raises:
        StudyError: see `choose`, `read_rows` and `write_report`.
        Paused, TrainingError: see `run_stage`.
    """
    size, chosen = choose(arguments.studies, arguments.variants, arguments.size)
    rows = read_rows(arguments.rows)
    if arguments.list:
        print(listing(chosen, size, arguments.seeds, rows))
    elif arguments.report:
        from melt_serve.train.studies.ablation_report import write_report

        for path in write_report(arguments.report, chosen, size, rows):
            print(f"wrote {path}")
    else:
        run_all(chosen, size, arguments.seeds, arguments.rows, session)


def choose(
    names: Sequence[str], variants: Sequence[str] | None, size: str
) -> tuple["Size", dict[str, tuple["Variant", ...]]]:
    """The size, and the studies by name, each with the variants asked for.

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
    studies: dict[str, tuple["Variant", ...]], size: "Size", seeds: Sequence[int], path: Path, session: "Session"
) -> None:
    """Run what is not in the file yet: all variants with the first seed, then with the next.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    from melt_serve.train.studies.ablation_run import AblationRunner, settings

    runner = AblationRunner()
    planned = [
        Planned(
            f"{variant.name}, seed {seed}",
            settings(variant, size, seed),
            partial(runner.run, variant, size, seed, session=session),
        )
        for seed in seeds
        for study in studies.values()
        for variant in study
        if seed in variant.seeds(seeds)
    ]
    run_missing(planned, path)


def listing(studies: dict[str, tuple["Variant", ...]], size: "Size", seeds: Sequence[int], rows: Sequence[Row]) -> str:
    """Studies and variants in columns, with the runs that are done and the minutes that are left."""
    from melt_serve.terminal import columns
    from melt_serve.train.studies.ablation_run import settings

    taken = [row["seconds"] / 60 for row in rows if row["size"] == size.name]
    each = sum(taken) / len(taken) if taken else size.minutes
    done = [row["settings"] for row in rows]
    lines, left = [("study", "variant", "done", "what")], 0
    for name, study in studies.items():
        for variant in study:
            wanted = variant.seeds(seeds)
            ran = sum(settings(variant, size, seed) in done for seed in wanted)
            left += len(wanted) - ran
            lines.append((name, variant.name, f"{ran} of {len(wanted)}", variant.what))
    return f"{columns(lines)}\n\nsize {size.name}: about {each:.1f} minutes a run, {left * each:.0f} minutes to go"
