"""The `melt-serve` command: convert a checkpoint, serve it, see it work, count its right answers, measure it.

A thin layer: every subcommand imports what it needs only when it runs, so that `--help` is instant.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from melt_serve.bench.command import add_bench
from melt_serve.terminal import fail, loop_list, positive, threshold_list, words_of

DESCRIPTION = """\
Serve Memory-Efficient Looped Transformers (MELT) with vLLM: depth without KV-cache growth.

A looped model runs its layers several times a token and normally keeps KV rows for every loop.
MELT keeps one row, rewritten at each loop, so more loops cost no more cache."""

EXAMPLES = """\
examples:
  melt-serve demo                                    see a small bundled MELT answer, on CPU if need be
  melt-serve convert ./Ouro-1.4B ./melt-1.6B         give a looped model MELT's gate, ready for training
  melt-serve serve ./melt-1.6B --port 8000           an OpenAI-compatible server; any vLLM flag works
  melt-serve eval --loops 1,4                        right answers of the bundled checkpoints, by depth
  melt-serve plan ouro-1.4b --device-memory 24       how many requests fit, as a MELT and as a LoopLM
  melt-serve bench memory                            the same, read from running engines
  melt-serve bench throughput                        tokens a second against a LoopLM, on real engines
  melt-serve bench depth                             time, cache and right answers with more or fewer loops
  melt-serve bench kernels                           MELT's own arithmetic against what the device copies
  melt-serve bench reference                         the reference model over loops, on a GPU if there is one
  melt-serve COMMAND --help                          what a command takes"""

CONVERT_DESCRIPTION = """\
Turn an Ouro-format looped checkpoint (safetensors, one file or shards) into a MELT checkpoint.

The weights are verified and copied; a fresh KV gate is added in the same dtype. The new gate is
untrained: post-train the result before you judge its answers. Memory stays near one shard."""

CONVERT_EXAMPLES = """\
examples:
  melt-serve convert ./Ouro-1.4B ./melt-1.6B
      the paper's element-wise gate; chunks of 512 tokens, tokens decoded one at a time
  melt-serve convert ./Ouro-1.4B ./melt-64 --chunk-size 64 --decode-mode chunk --max-loops 8
      small chunks, decoded on the same grid they are trained on, run with up to 8 loops
  melt-serve convert ./Ouro-1.4B ./last --gate-type last
      no gate to learn: the row of the last loop stays; the starting point of the ablations"""

EVAL_DESCRIPTION = """\
Ask checkpoints the held-out questions of the bundled task, greedily, and print how many answers are right.

The reference model answers, in float32 on this machine. With --server, an OpenAI-compatible server does."""

EVAL_EXAMPLES = """\
examples:
  melt-serve eval
      the bundled LoopLM teacher and its MELT student, each at its own depth
  melt-serve eval --loops 1,2,4 --decode-mode token,chunk
      the same by depth, and the MELT in both decode modes
  melt-serve eval --exit-threshold 1,0.5
      with and without tokens that leave their loops early
  melt-serve eval ./my-melt --questions 200 --json
      another checkpoint, quicker; ends with one line of JSON
  melt-serve eval --server http://localhost:8000/v1
      whatever is served there
  OPENAI_API_KEY=... melt-serve eval --server https://example.com/v1 --model some-model --questions 50
      a model of somebody else's

Other benchmarks, such as MATH-500: lm-eval, see melt_serve/train/README.md."""

PLAN_DESCRIPTION = """\
Show what each part of a model takes of a device's memory, as a MELT in both decode modes, as a LoopLM, and as a plain
transformer of the same shape. Arithmetic only: nothing is loaded. GB are 10^9 bytes."""

PLAN_EXAMPLES = """\
examples:
  melt-serve plan
      Ouro-1.4B's shape at 4 loops, one request of 32,000 tokens
  melt-serve plan ouro-2.6b --loops 8 --context 8192 --requests 64 --device-memory 80
      another shape and load, and how many requests fit in 80 GB
  melt-serve plan ./my-melt --kv-dtype fp8
      a checkpoint of your own, with FP8 rows"""
Handler = Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; give the process's exit code.

    Args:
        argv: the words after `melt-serve`, by default the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in PASSED_THROUGH:
            return PASSED_THROUGH[words[0]](words[1:])
        arguments = parser().parse_args(words)
        return arguments.run(arguments)
    except OSError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The words and flags of `melt-serve`; `serve` and `demo` are listed, but parse their own."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("melt-serve", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    version = importlib.metadata.version("melt_serve")
    top.add_argument("--version", action="version", version=f"melt-serve {version}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    commands.add_parser("demo", help="see a small bundled MELT at work", add_help=False)
    convert = commands.add_parser(
        "convert",
        help="give an Ouro-format checkpoint MELT's gate",
        description=CONVERT_DESCRIPTION,
        epilog=CONVERT_EXAMPLES,
        formatter_class=raw,
    )
    commands.add_parser("serve", help="start an OpenAI-compatible vLLM server", add_help=False)

    evaluate = commands.add_parser(
        "eval",
        help="count right answers to held-out questions",
        description=EVAL_DESCRIPTION,
        epilog=EVAL_EXAMPLES,
        formatter_class=raw,
    )

    plan = commands.add_parser(
        "plan",
        help="see what fits in a device's memory",
        description=PLAN_DESCRIPTION,
        epilog=PLAN_EXAMPLES,
        formatter_class=raw,
    )

    plan.set_defaults(run=run_plan)
    add = plan.add_argument
    add("model", metavar="MODEL", nargs="?", default="ouro-1.4b", help="ouro-1.4b, ouro-2.6b, or a checkpoint's folder")
    add("--loops", type=positive, metavar="T", help="loops a token runs (default: the config's)")
    add("--context", type=positive, default=32000, metavar="N", help="tokens a request holds (default: 32000)")
    add("--requests", type=positive, default=1, metavar="N", help="requests at once (default: 1)")
    add("--chunk-size", type=positive, metavar="C", help="the MELT's (default: the config's, or 512)")
    add("--step-tokens", type=positive, default=2048, metavar="N", help="--max-num-batched-tokens (default: 2048)")
    add(
        "--kv-dtype", choices=("float32", "bfloat16", "fp8"), default="bfloat16", help="of the rows (default: bfloat16)"
    )
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (default: bfloat16)")
    add("--device-memory", type=float, metavar="GB", help="also say how many requests fit in this much")
    add("--json", action="store_true", help="end with one line of JSON")

    convert.set_defaults(run=run_convert)
    add = convert.add_argument
    add("source", metavar="SRC", type=Path, help="folder of the Ouro-format checkpoint")
    add("target", metavar="DST", type=Path, help="folder to write; must not exist or be empty")
    add(
        "--gate-type",
        choices=("elementwise", "scalar", "mean", "ema", "last"),
        default="elementwise",
        help="how a token's state is carried from loop to loop (default: elementwise, the paper's)",
    )
    add(
        "--initial-state",
        choices=("input", "zeros"),
        default="input",
        help="the state before loop 1: the first loop's input, or zeros (default: input)",
    )
    add("--chunk-size", type=int, default=512, metavar="C", help="tokens that run their loops together (default: 512)")
    add(
        "--decode-mode",
        choices=("token", "chunk"),
        default="token",
        help="generated tokens are chunks of their own, or fill the grid like a prompt's (default: token)",
    )
    add("--max-loops", type=int, metavar="T", help="the most loops it may be run with (default: the source's)")
    add("--seed", type=int, default=0, help="seed of the fresh gate's weights (default: 0)")
    add("--quiet", action="store_true", help="no progress bar")

    evaluate.set_defaults(run=run_eval)
    add = evaluate.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="*", type=Path, help="folders (default: the bundled checkpoints)")
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
    add("--server", metavar="URL", help="ask this OpenAI-compatible server instead, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", help="of the server's (default: the first it lists)")
    add("--api-key", metavar="KEY", help="for the server (default: OPENAI_API_KEY, which other users cannot see)")
    add("--json", action="store_true", help="end with one line of JSON")
    add_bench(commands)
    return top


def run_convert(arguments: argparse.Namespace) -> int:
    """`melt-serve convert`."""
    from melt_serve.checkpoint_files import CheckpointError
    from melt_serve.convert import convert

    try:
        convert(
            arguments.source,
            arguments.target,
            gate_type=arguments.gate_type,
            initial_state=arguments.initial_state,
            chunk_size=arguments.chunk_size,
            decode_mode=arguments.decode_mode,
            max_loops=arguments.max_loops,
            seed=arguments.seed,
            show_progress=not arguments.quiet,
        )
    except CheckpointError as error:
        return fail(error)
    print(f"Wrote {arguments.target}. The gate is untrained; to serve it: melt-serve serve {arguments.target}")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """`melt-serve eval`."""
    from melt_serve.task import evaluate

    depth = (arguments.loops, arguments.decode_mode, arguments.exit_threshold)
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
            scores = evaluate.evaluate_checkpoints(arguments.checkpoints, arguments.questions, *depth)
    except evaluate.EvaluationError as error:
        return fail(error)
    print(evaluate.table(scores))
    if arguments.json:
        print(json.dumps({"rows": [asdict(score) for score in scores]}))
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """`melt-serve plan`."""
    from melt_serve import capacity

    try:
        config = capacity.shape_of(arguments.model)
    except capacity.PlanError as error:
        return fail(error)
    load = capacity.Load(
        loops=arguments.loops or config.total_ut_steps,
        context=arguments.context,
        requests=arguments.requests,
        step_tokens=arguments.step_tokens,
        kv_dtype=arguments.kv_dtype,
        weight_bytes=capacity.KV_BYTES[arguments.dtype],
    )
    chunk_size = arguments.chunk_size or getattr(config, "chunk_size", 512)
    device = None if arguments.device_memory is None else int(arguments.device_memory * capacity.GB)
    plans = capacity.compare(config, load, chunk_size, device)
    tokens = f"{load.requests:,} x {load.context:,} tokens"
    print(f"{arguments.model}, T={load.loops}, C={chunk_size}, {tokens}, rows in {load.kv_dtype}")
    print(capacity.table(plans))
    if arguments.json:
        print(json.dumps({"rows": [{**asdict(each), "total": each.total} for each in plans]}))
    return 0


def run_serve(words: Sequence[str]) -> int:
    """`melt-serve serve`."""
    from melt_serve.serve import main

    return main(list(words))


def run_demo(words: Sequence[str]) -> int:
    """`melt-serve demo`."""
    from melt_serve.demo import main

    return main(list(words))


# argparse would take flags such as --help for itself, so these two never reach it.
PASSED_THROUGH: dict[str, Handler] = {"serve": run_serve, "demo": run_demo}


if __name__ == "__main__":
    sys.exit(main())
