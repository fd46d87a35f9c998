"""`python -m melt_serve.train trial`: some steps of each phase, and what they ask of this device."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.terminal import at_least, columns, fail, positive

if TYPE_CHECKING:
    from melt_serve.train.cost.trial_run import Row, Trial


ROWS = Path("runs/trial/rows.jsonl")
RECIPE = "melt-1.6b"
STEPS = 5
CPU_SCALE = 16
DESCRIPTION = f"""\
Take some steps of each phase of a post-training, and say what they ask of this device: tokens a second, memory, and the
share of the arithmetic that it can do, by the rate of one large matmul in the recipe's dtype, measured after the
steps. All is as in `run` but for what is learnt: weights are random, of the teacher's shape, and so are the tokens; a
sequence is one document, and all of it is learnt. No checkpoint or data is read.

On a GPU the size is the true one. Without one it is reduced: 1/{CPU_SCALE} of the width, two layers, few words,
sequences of two chunks unless sequence_length= says otherwise; --scale 1 asks for the true size there, too. A step has
two micro-batches unless batch_tokens= says otherwise.

A trial can be cut into sessions: after --minutes, Ctrl-C or SIGTERM its state is saved, and the same command goes on.
The first step of a phase in each session warms up and does not count. Each phase is a line of JSON in --rows; one that
is there already, of the same settings and the same kind of device, is shown, not measured again.

Exit codes: 0 done, 1 an error, 2 wrong words, 3 --minutes are over, 130 Ctrl-C, 143 SIGTERM."""
EXAMPLES = """\
examples:
  python -m melt_serve.train trial                               MELT-1.6B: on a GPU at its true size, else reduced
  python -m melt_serve.train trial --minutes 8                   ... eight minutes of it, and the time to save
  python -m melt_serve.train trial melt-1.6b sequence_length=4096 --steps 20
  python -m melt_serve.train trial ./mine.toml micro_batch=2 checkpoint_chunks=false --rows mine.jsonl
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `trial` to the commands of `python -m melt_serve.train`."""
    command = commands.add_parser(
        "trial",
        help="take some steps of a recipe with random weights, and see what they ask of this device",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run_command=trial)
    add = command.add_argument
    add("recipe", metavar="RECIPE", nargs="?", default=RECIPE, help=f"a recipe's name or file (default: {RECIPE})")
    add("overrides", metavar="key=value", nargs="*", help="change a field of the recipe")
    add("--steps", type=at_least(2), default=STEPS, metavar="N", help=f"of each phase (default: {STEPS})")
    add(
        "--scale",
        dest="reduced_by",
        type=positive,
        metavar="K",
        help=f"reduce the width by K (default: 1, the true size, on a GPU, else {CPU_SCALE})",
    )
    add("--rows", type=Path, default=ROWS, help=f"file of results (default: {ROWS})")
    add("--minutes", type=float, default=10.0, metavar="M", help="save and stop after M minutes (default: 10)")


def trial(arguments: argparse.Namespace) -> int:
    """Run what the command line asks for; the exit code."""
    import torch

    from melt_serve.capacity import PlanError
    from melt_serve.train.cost.trial_run import measure, prepare
    from melt_serve.train.recipe_files import RecipeError
    from melt_serve.train.session import Paused, Session, StudyError, TrainingError

    session = Session(arguments.minutes)
    if "=" in arguments.recipe and not Path(arguments.recipe).exists():
        arguments.recipe, arguments.overrides = RECIPE, [arguments.recipe, *arguments.overrides]
    scale = arguments.reduced_by or (1 if torch.cuda.is_available() else CPU_SCALE)
    rows: list[Row] = []
    try:
        tried = prepare(arguments.recipe, arguments.overrides, scale, arguments.steps)
        print(head(arguments.recipe, tried), flush=True)
        for row in measure(tried, arguments.rows, session):
            rows.append(row)
    except Paused:
        print(f"paused, all is saved beside {arguments.rows}; the same command goes on", file=sys.stderr)
        return 3 if session.signal is None else 128 + session.signal
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from where the last session ended", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        return fail(
            f"{error}; lower sequence_length or micro_batch, or reduce the width with --scale", "melt_serve.train"
        )
    except (StudyError, OSError, PlanError, RecipeError, TrainingError) as error:
        return fail(error, "melt_serve.train")
    finally:
        if rows:
            print(f"\n{table(rows)}")
    return 0


def head(name: str, tried: "Trial") -> str:
    """What is tried, where, and how it differs from a run."""
    import torch

    from melt_serve.device import name_of

    recipe, device = tried.recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (
        f"{name}: a random LoopLM of the shape of {recipe.teacher}, random tokens, {recipe.dtype}\n"
        f"a step: {recipe.sequences} sequences, {recipe.micro_batch} at a time, in chunks of {recipe.chunk_size}; "
        f"batch_tokens={recipe.batch_tokens:,} (the recipe: {tried.run_tokens:,})\n"
        f"device: {name_of(device)}, size: {tried.size}"
    )


def table(rows: "Sequence[Row]") -> str:
    """The phases in columns; GB and GFLOP are 10^9."""
    lines: list[tuple[str, ...]] = [
        (
            "phase",
            "steps counted",
            "tokens/s",
            "slowest",
            "fastest",
            "peak memory",
            "GFLOP a token",
            "GFLOP/s",
            "of a matmul's",
            "with what runs again",
        )
    ]
    for row in rows:
        lines.append(
            (
                row["phase"],
                f"{len(row['seconds'])} of {row['steps']}",
                *(f"{row[rate]:,.0f}" for rate in ("tokens_per_second", "slowest", "fastest")),
                f"{row['peak_memory'] / 1e9:.2f} GB",
                f"{row['flops_per_token'] / 1e9:,.4g}",
                f"{row['flops_per_second'] / 1e9:,.4g}",
                f"{row['share']:.0%} of {row['matmul_rate'] / 1e9:,.4g}",
                f"{row['share_with_repeats']:.0%}",
            )
        )
    return columns(lines)
