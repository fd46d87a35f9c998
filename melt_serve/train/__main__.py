"""`python -m melt_serve.train`: make a MELT, the bundled one or one's own, and learn what that costs and is worth."""

import argparse
import sys
from collections.abc import Sequence

from melt_serve.train import bundled, export, run
from melt_serve.train.commands import expected_errors, fail, say
from melt_serve.train.cost import memory, plan, trial
from melt_serve.train.data import show
from melt_serve.train.studies import ablate, lengths

COMMANDS = (bundled, run, export, plan, trial, memory, show, ablate, lengths)
RENAMED = {"demo": "bundled", "plan": "cost"}
"""Commands by the names they had while `melt-serve` used the same names for others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 when done, 1 after an error, 3 after --minutes, 130 after Ctrl-C.

    Args:
        argv: the words after `python -m melt_serve.train`, by default the process's own.
    """
    arguments = parsed(sys.argv[1:] if argv is None else argv)
    try:
        return arguments.run_command(arguments)
    except KeyboardInterrupt:
        return 130
    except expected_errors() as error:
        return fail(error)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of one command; its namespace holds the function that runs it, as `run_command`."""
    words = list(argv)
    if words and words[0] in RENAMED:
        say(f"melt_serve.train: `{words[0]}` is called `{RENAMED[words[0]]}` now")
        words[0] = RENAMED[words[0]]
    parser = argparse.ArgumentParser("python -m melt_serve.train", description="Train MELT checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    arguments, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest  # argparse takes no key=value after a flag
    return arguments


if __name__ == "__main__":
    sys.exit(main())
