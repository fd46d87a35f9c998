"""`melt-serve eval`: its flags."""

import argparse
import sys

from melt_serve.terminal import (
    Subcommands,
    add_command,
    contrast_list,
    fail,
    loop_list,
    positive,
    print_json,
    server_url,
    threshold_list,
    words_of,
)

DESCRIPTION = """\
Ask checkpoints the held-out questions of the bundled task, greedily, and print how many answers are right.

The reference model answers, in float32 on this machine. With --server, an OpenAI-compatible server does."""

EXAMPLES = """\
examples:
  melt-serve eval
      the bundled LoopLM teacher and its MELT student, each at its own depth
  melt-serve eval --loops 1,2,4 --decode-mode token,chunk
      the same by depth, and the MELT in both decode modes
  melt-serve eval --exit-threshold 1,0.5
      with and without tokens that leave their loops early
  melt-serve eval --loops 2,3 --contrast 0,0.5,1
      where there are too few loops, with answers that are moved on, away from an earlier loop's
  melt-serve eval ./my-melt --questions 200 --json
      another checkpoint, quicker; ends with one line of JSON
  melt-serve eval --server http://localhost:8000/v1
      whatever is served there
  OPENAI_API_KEY=... melt-serve eval --server https://example.com/v1 --model some-model --questions 50
      a model of somebody else's

Other benchmarks, such as MATH-500: lm-eval, see docs/training.md."""


def add_eval(commands: "Subcommands[argparse.ArgumentParser]") -> None:
    """Add `eval` to the commands of `melt-serve`."""
    command = add_command(commands, "eval", "count right answers to held-out questions", DESCRIPTION, EXAMPLES)
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        help="folders, or OWNER/NAME on the hub (default: the bundled ones)",
    )
    add("--loops", type=loop_list, metavar="T,T", help="depths to run (default: the checkpoint's own)")
    add("--questions", type=positive, default=1000, metavar="N", help="how many to ask (default: 1000)")
    add(
        "--decode-mode",
        type=words_of("token", "chunk"),
        metavar="MODE,MODE",
        help="token, chunk or both (default: the MELT's own)",
    )
    add(
        "--exit-threshold",
        type=threshold_list,
        metavar="Q,Q",
        help="how sure the MELT's exit gate must be that a token may leave; 1: never (default: the MELT's own)",
    )
    add(
        "--contrast",
        type=contrast_list,
        metavar="W,W",
        help="how far answers are moved on, away from those of half of the loops; 0: not at all (default: 0)",
    )
    add(
        "--server",
        type=server_url,
        metavar="URL",
        help="ask this OpenAI-compatible server instead, such as http://localhost:8000/v1",
    )
    add("--model", metavar="NAME", help="of the server's (default: the first it lists)")
    add("--api-key", metavar="KEY", help="for the server (default: OPENAI_API_KEY, which other users cannot see)")
    add("--json", action="store_true", help="end with one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Ask the questions and print the scores; return the exit code."""
    from melt_serve.checkpoint_config import located_looped
    from melt_serve.checkpoint_path import CheckpointError
    from melt_serve.task import evaluate

    depth = (arguments.loops, arguments.decode_mode, arguments.exit_threshold, arguments.contrast)
    if arguments.server and (arguments.checkpoints or any(depth)):
        says = "--server goes with --model, --api-key, --questions and --json only"
        print(f"melt-serve eval: error: {says}", file=sys.stderr)
        return 2
    if not arguments.server and (arguments.model or arguments.api_key):
        print("melt-serve eval: error: --model and --api-key go with --server", file=sys.stderr)
        return 2
    try:
        if arguments.server:
            asked = (arguments.server, arguments.questions, arguments.model, arguments.api_key)
            scores = [evaluate.evaluate_server(*asked)]
        else:
            paths = [located_looped(each) for each in arguments.checkpoints]
            scores = evaluate.evaluate_checkpoints(paths, arguments.questions, *depth)
    except CheckpointError as error:
        return fail(error, code=2)
    except evaluate.EvaluationError as error:
        return fail(error)
    print(evaluate.table(scores))
    if arguments.json:
        print_json(scores)
    return 0
