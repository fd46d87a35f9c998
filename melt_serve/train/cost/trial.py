"""`python -m melt_serve.train trial`: some steps of each phase, and what they ask of this device."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.terminal import at_least, columns, positive
from melt_serve.train.commands import SAME_COMMAND, Commands, add_minutes, add_recipe, new_command, run_session
from melt_serve.train.results import Record, add_records
from melt_serve.train.session import Session, TrainingError

if TYPE_CHECKING:
    from melt_serve.train.cost.trial_run import Trial


FOLDER = Path("runs/trial")
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
The first step of a phase in each session warms up and does not count. Each phase is a line of JSON in --records; one
that is there already, of the same settings and the same kind of device, is shown, not measured again.

Exit codes: 0 done, 1 an error, 2 wrong words, 3 --minutes are over, 130 Ctrl-C, 143 SIGTERM."""
EXAMPLES = """\
examples:
  python -m melt_serve.train trial                               MELT-1.6B: on a GPU at its true size, else reduced
  python -m melt_serve.train trial --minutes 8                   ... eight minutes of it, and the time to save
  python -m melt_serve.train trial melt-1.6b sequence_length=4096 --steps 20
  python -m melt_serve.train trial ./mine.toml micro_batch=2 checkpoint_chunks=false --records mine.jsonl
"""


def add_command(commands: Commands) -> None:
    """Add `trial` to the commands of `python -m melt_serve.train`."""
    command = new_command(
        commands,
        "trial",
        trial,
        "take some steps of a recipe with random weights, and see what they ask of this device",
        DESCRIPTION,
        EXAMPLES,
    )
    add_recipe(command, RECIPE)
    add = command.add_argument
    add("--steps", type=at_least(2), default=STEPS, metavar="N", help=f"of each phase (default: {STEPS})")
    add(
        "--scale",
        dest="reduced_by",
        type=positive,
        metavar="K",
        help=f"reduce the width by K (default: 1, the true size, on a GPU, else {CPU_SCALE})",
    )
    add_records(command, FOLDER)
    add_minutes(command, 10.0)


def trial(arguments: argparse.Namespace) -> int:
    """Take the steps that are not recorded yet, print what is recorded, and return the exit code.

    Raises:
        RecipeError, PlanError: see `prepare`.
        StudyError, TrainingError: see `measure`.
    """
    import torch

    from melt_serve.train.cost.trial_run import measure, prepare

    if "=" in arguments.recipe and not Path(arguments.recipe).exists():
        arguments.recipe, arguments.overrides = RECIPE, [arguments.recipe, *arguments.overrides]
    scale = arguments.reduced_by or (1 if torch.cuda.is_available() else CPU_SCALE)
    tried = prepare(arguments.recipe, arguments.overrides, scale, arguments.steps)
    print(head(arguments.recipe, tried), flush=True)

    def work(session: Session) -> None:
        records: list[Record] = []
        try:
            for record in measure(tried, arguments.records, session):
                records.append(record)
        except torch.OutOfMemoryError as error:
            remedy = "lower sequence_length or micro_batch, or reduce the width with --scale"
            raise TrainingError(f"{error}; {remedy}") from None
        finally:
            if records:
                print(f"\n{table(records)}")

    return run_session(
        work,
        arguments.minutes,
        f"paused, all is saved beside {arguments.records}; {SAME_COMMAND}",
        f"stopped; {SAME_COMMAND} from where the last session ended",
    )


def head(name: str, tried: "Trial") -> str:
    """Describe what is tried, where, and how it differs from a run."""
    import torch

    from melt_serve.device import name_of

    recipe, device = tried.recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (
        f"{name}: a random LoopLM of the shape of {recipe.teacher}, random tokens, {recipe.dtype}\n"
        f"a step: {recipe.sequences} sequences, {recipe.micro_batch} at a time, in chunks of {recipe.chunk_size}; "
        f"batch_tokens={recipe.batch_tokens:,} (the recipe: {tried.run_tokens:,})\n"
        f"device: {name_of(device)}, size: {tried.size}"
    )


def table(records: Sequence[Record]) -> str:
    """Format the phases in columns; GB and GFLOP are 10^9."""
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
    for record in records:
        lines.append(
            (
                record["phase"],
                f"{len(record['seconds'])} of {record['steps']}",
                *(f"{record[rate]:,.0f}" for rate in ("tokens_per_second", "slowest", "fastest")),
                f"{record['peak_memory'] / 1e9:.2f} GB",
                f"{record['flops_per_token'] / 1e9:,.4g}",
                f"{record['flops_per_second'] / 1e9:,.4g}",
                f"{record['share']:.0%} of {record['matmul_rate'] / 1e9:,.4g}",
                f"{record['share_with_repeats']:.0%}",
            )
        )
    return columns(lines)
