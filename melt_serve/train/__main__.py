"""`python -m melt_serve.train`: make what the package bundles."""

import argparse
import math
import sys
from pathlib import Path

from melt_serve.bundled import CHECKPOINTS
from melt_serve.train.ablate import add_command as add_ablate

DESCRIPTION = """\
Make the bundled checkpoints from nothing: train a LoopLM teacher, turn it into a MELT by the paper's two phases,
measure both on held-out questions, and write them with their cards. About half an hour on
2 CPU cores.

A run can be cut into sittings: Ctrl-C, SIGTERM or --minutes saves it after the current step, and it is saved every
minute anyway. --resume goes on, and computes exactly what an unbroken run would have."""

EXAMPLES = """\
examples:
  python -m melt_serve.train demo                           remake the bundled checkpoints, in place
  python -m melt_serve.train demo --minutes 20              the first twenty minutes of it
  python -m melt_serve.train demo --resume                  ... and the rest
  python -m melt_serve.train demo --out ./mine --seed 1     others of their kind, elsewhere
"""


def main() -> int:
    """Run one subcommand; the exit code: 0 when done, 3 when a sitting ended first, 130 after Ctrl-C."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m melt_serve.train", description="Train MELT checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="remake the bundled checkpoints from nothing",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    demo.set_defaults(run_command=run)
    add = demo.add_argument
    add("--out", type=Path, default=CHECKPOINTS, help="folder for both checkpoints (default: the bundled ones')")
    add("--run", type=Path, default=Path("runs/demo"), help="folder for states and logs (default: runs/demo)")
    add("--resume", action="store_true", help="go on with the run in that folder")
    add("--minutes", type=float, default=math.inf, metavar="M", help="save and stop after M minutes")
    add("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    add("--questions", type=int, default=1000, metavar="N", help="held-out questions to measure on (default: 1000)")
    add_ablate(commands)
    arguments = parser.parse_args()
    if getattr(arguments, "questions", 1) < 1:
        demo.error(f"--questions must be at least 1, not {arguments.questions}")
    if arguments.minutes < 0:
        demo.error(f"--minutes must not be negative, but is {arguments.minutes}")
    return arguments.run_command(arguments)


def run(arguments: argparse.Namespace) -> int:
    """`python -m melt_serve.train demo`."""
    from melt_serve.train.demo import make_checkpoints
    from melt_serve.train.evaluate import table
    from melt_serve.train.recipe import Recipe
    from melt_serve.train.trainer import Paused, Sitting, TrainingError

    again = f"go on with: python -m melt_serve.train demo --resume --run {arguments.run}"
    sitting = Sitting(arguments.minutes)
    try:
        if not arguments.resume and any(arguments.run.glob("*.state.pt")):
            raise TrainingError(f"{arguments.run} holds a run already: add --resume, or choose another --run folder")
        recipe = Recipe().seeded(arguments.seed)
        scores = make_checkpoints(recipe, arguments.run, arguments.out, sitting, arguments.questions)
    except Paused:
        print(f"paused, everything is saved; {again}", file=sys.stderr)
        return 3 if sitting.signal is None else 128 + sitting.signal
    except KeyboardInterrupt:
        print(f"\nstopped, the training is saved; {again}", file=sys.stderr)
        return 130
    except (OSError, TrainingError) as error:
        print(f"melt_serve.train: error: {error}", file=sys.stderr)
        return 1
    print(table(scores))
    print(f"wrote {arguments.out}/looplm-demo and {arguments.out}/melt-demo; losses: {arguments.run}/losses.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
