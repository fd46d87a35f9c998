"""`python -m melt_serve.train`: remake what the package bundles."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

BUNDLED = Path(__file__).parent.parent / "checkpoints" / "melt-demo"

EXAMPLES = """\
examples:
  python -m melt_serve.train demo                     remake the bundled checkpoint, in place
  python -m melt_serve.train demo --out ./melt-demo   the same, elsewhere
  python -m melt_serve.train demo --seed 1            another one of its kind
"""


def main() -> int:
    """Run one subcommand; the exit code."""
    parser = argparse.ArgumentParser("python -m melt_serve.train", description="Train MELT checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="remake the bundled demo checkpoint from nothing",
        description="Train the bundled demo checkpoint from nothing with fixed seeds, measure it on held-out "
        "questions, and write it with its card. Takes about 10 to 20 minutes on 2 CPU cores.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=BUNDLED, help="folder to write (default: the bundled checkpoint's)")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    demo.add_argument("--warm-steps", type=int, help="steps at one loop")
    demo.add_argument("--melt-steps", type=int, help="steps at all loops")
    demo.add_argument("--questions", type=int, default=1000, help="held-out questions to measure on (default: 1000)")
    arguments = parser.parse_args()

    from melt_serve.train.direct import Recipe, make_checkpoint

    steps = {name: getattr(arguments, name) for name in ("warm_steps", "melt_steps") if getattr(arguments, name)}
    try:
        scores = make_checkpoint(arguments.out, replace(Recipe(seed=arguments.seed), **steps), arguments.questions)
    except OSError as error:
        print(f"melt_serve.train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    for loops, score in scores.items():
        print(f"loops={loops}: {score:.1%} of {arguments.questions} held-out questions right")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
