"""`python -m melt_serve.train memory`: the memory of a training step as sequences and loops grow."""

import argparse
from pathlib import Path

from melt_serve.terminal import fail, loop_list

DESCRIPTION = """\
Measure the most memory that a real training step takes, forward and backward, as sequences and loops grow: phase 1 and
phase 2, with checkpoint_chunks and without, beside what `plan` says of the same shape. Phase 1 also without the
LoopLM's rows: the difference is what they cost.

The shape is the recipe's with the width divided by --scale, two layers and few words, and random weights; chunks are as
long as the recipe's. Lengths are measured at the recipe's loops, loops at the middle one of the lengths. Weights and
what else is there before a step are not counted. On a GPU it is what its allocator had given out; on a CPU the tensors
that were alive, without what a kernel needs for itself."""
EXAMPLES = """\
examples:
  python -m melt_serve.train memory melt-1.6b --report memory.md
      tables, memory.svg and memory.json
  python -m melt_serve.train memory melt-1.6b chunk_size=64 --lengths 128,256,512 --loops 1,4
      short chunks: a minute or two
  python -m melt_serve.train memory ./mine.toml --scale 1
      at the recipe's own width, on a GPU
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add `memory` to the commands of `python -m melt_serve.train`; the recipe's words are the caller's to add."""
    command = commands.add_parser(
        "memory",
        help="measure what a step takes as sequences and loops grow",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run_command=run)
    add = command.add_argument
    add("--scale", type=int, default=32, metavar="K", help="measure at 1/K of the width (default: 32)")
    add("--lengths", type=loop_list, metavar="S,...", help="tokens of a sequence (default: 2, 4, 8 and 16 chunks)")
    add("--loops", type=loop_list, default=[1, 2, 4, 8], metavar="T,...", help="(default: 1,2,4,8)")
    add("--report", type=Path, metavar="FILE.md", help="also write FILE.md, FILE.svg and FILE.json")
    return command


def run(arguments: argparse.Namespace) -> int:
    """`python -m melt_serve.train memory`."""
    from melt_serve.capacity import PlanError
    from melt_serve.train.cost.memory_report import by_length, by_loops, refuse_report, table, write_report
    from melt_serve.train.cost.plan import to_be_planned
    from melt_serve.train.cost.step_memory import measure
    from melt_serve.train.recipe_files import RecipeError

    try:
        recipe, teacher = to_be_planned(arguments.recipe, arguments.overrides)
        if arguments.report:
            refuse_report(arguments.report)
    except (OSError, PlanError, RecipeError) as error:
        return fail(error, "melt_serve.train")
    lengths = arguments.lengths or [chunks * recipe.chunk_size for chunks in (2, 4, 8, 16)]
    try:
        found = measure(recipe, teacher, arguments.scale, lengths, arguments.loops)
    except KeyboardInterrupt:
        return 130
    print(f"{table(found, by_length)}\n\n{table(found, by_loops)}")
    if arguments.report:
        try:
            files = write_report(arguments.report, found, recipe, arguments.recipe, arguments.scale)
        except OSError as error:
            return fail(error, "melt_serve.train")
        print(f"\nwrote {', '.join(map(str, files))}")
    return 0
