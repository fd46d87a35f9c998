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
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measured = TypeVar("Measured")

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

BENCH_MEMORY_DESCRIPTION = """\
Start a real engine for each line, with random weights and the same KV bytes, and read from it what a token and a
request cost, how many fit, and what the process took at its peak. Every engine runs in a process of its own."""

BENCH_MEMORY_EXAMPLES = """\
examples:
  melt-serve bench memory
      the bundled checkpoint's shape at 1 to 32 loops, as a MELT in both decode modes and as a LoopLM
  melt-serve bench memory --shape melt-1.6b --loops 1,4 --kv-dtype auto,fp8
      Ouro-1.4B's true shape, also with FP8 rows; takes 8 GB of memory
  melt-serve bench memory --loops 1,2,4,8 --models melt --plot memory.png --json
      MELT alone, with a plot, and one line of JSON at the end"""

BENCH_THROUGHPUT_DESCRIPTION = """\
Serve the same requests with a MELT and a LoopLM of one shape, on real engines with random weights and the same KV
bytes, in turn, and compare: once with a cache too small for all requests, once with room for all."""

BENCH_THROUGHPUT_EXAMPLES = """\
examples:
  melt-serve bench throughput
      8 layers, d=512, 32 requests of 128 + 128 tokens, at 4 and 8 loops; takes a quarter of an hour on 2 CPU cores
  melt-serve bench throughput --loops 4 --cache scarce --fit 2 --profile
      one setting, a scarcer cache, and where the time goes
  melt-serve bench throughput --loops 2 --layers 2 --requests 8 --generated 32 --json
      smaller and quicker, and one line of JSON at the end"""

BENCH_DEPTH_DESCRIPTION = """\
Serve the same requests at each depth with one MELT engine, round by round. It has random weights and is built once,
for the most loops; each request says its own. Shown are tokens a second, the time between two tokens of a request
that is alone, the time relative to 4 loops, and the KV cache that a token and a request's open chunk take, counted
in the blocks that the engine gave away. Then half of the requests think less than the others, against all at the
larger depth."""

BENCH_DEPTH_EXAMPLES = """\
examples:
  melt-serve bench depth
      8 layers, d=512, 16 requests of 128 + 64 tokens, at 1 to 16 loops; takes ten minutes or so on 2 quiet CPU cores
  melt-serve bench depth --accuracy 200 --plot depth.png
      also the share of right answers of the bundled checkpoint, as deep as it goes, and a figure
  melt-serve bench depth --decode-mode chunk --chunk-size 64
      the other decode mode, in which an open chunk keeps rows of every loop
  melt-serve bench depth --loops 1,2,4 --mix 2,4 --layers 2 --requests 8 --generated 32 --json
      smaller and quicker, another mix, and one line of JSON at the end"""

BENCH_KERNELS_DESCRIPTION = """\
Time MELT's kernels and hold them against what the same device copies and multiplies, in one process: the gate, the
gate with its gradient, and RoPE with the write of K and V rows; each as PyTorch's eager operators, as torch.compile
makes it, and in Triton (on a GPU). Then a MELT layer against a LoopLM layer, decoding at T=4, and a training step of
phase 2 with the operations it needs. Goals are for an H200 and the paper's shape; elsewhere there are none."""

BENCH_KERNELS_EXAMPLES = """\
examples:
  melt-serve bench kernels
      on a GPU, if there is one, the paper's shape; on a CPU two layers of d=256, which takes some minutes
  melt-serve bench kernels --tokens 64,512 --batch 8 --context 128 --train-tokens 0 --no-compile --json
      smaller and quicker, without a training step and torch.compile, and one line of JSON at the end
  melt-serve bench kernels --device cuda --plot kernels.png
      also draw every version beside the time in which the device copies as many bytes"""

BENCH_REFERENCE_DESCRIPTION = """\
Generate with the reference model, bfloat16, random weights, its gate a fused kernel on a GPU, at every depth: tokens a
second, the bytes of K and V rows at the end, and on a GPU its most memory in use, weights included."""

BENCH_REFERENCE_EXAMPLES = """\
examples:
  melt-serve bench reference --plot reference.png
      1 to 16 loops: on a GPU the paper's shape, 24 layers of d=2048; on a CPU 2 layers of d=256
  melt-serve bench reference --shape melt-1.6b --loops 1,4 --batch 1 --generated 8
      the true shape also on a CPU, which takes 4 GB of memory and its time"""

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


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`melt-serve bench`, whose measurements are subcommands of their own."""
    raw = argparse.RawDescriptionHelpFormatter
    bench = commands.add_parser("bench", help="measure MELT on real engines, against LoopLM and by depth")
    benches = bench.add_subparsers(metavar="WHAT", required=True)

    memory = benches.add_parser(
        "memory",
        help="what a token, a request and a process cost",
        description=BENCH_MEMORY_DESCRIPTION,
        epilog=BENCH_MEMORY_EXAMPLES,
        formatter_class=raw,
    )
    memory.set_defaults(run=run_bench_memory)
    add = memory.add_argument
    add("--shape", choices=("demo", "melt-1.6b"), default="demo", help="sizes of the model (default: demo)")
    add("--loops", type=loop_list, default=[1, 2, 4, 8, 16, 32], metavar="T,T", help="depths (default: 1,2,4,8,16,32)")
    add(
        "--models",
        type=words_of("melt", "looplm"),
        default=["melt", "looplm"],
        metavar="MODEL,MODEL",
        help="default: melt,looplm",
    )
    add(
        "--kv-dtype",
        type=words_of("auto", "fp8"),
        default=["auto"],
        metavar="DTYPE,DTYPE",
        help="of the rows: auto (bfloat16), fp8 or both (default: auto)",
    )
    add(
        "--kv-cache-memory",
        type=byte_count,
        metavar="BYTES",
        help="KV cache of every engine, such as 8M or 2G (default: 64M; 2G for melt-1.6b)",
    )
    add("--chunk-size", type=positive, default=64, metavar="C", help="the MELT's (default: 64)")
    add("--context", type=positive, metavar="N", help="tokens a request may have (default: 2048; 256 for melt-1.6b)")
    add("--step-tokens", type=positive, default=64, metavar="N", help="tokens a step may have (default: 64)")
    add_output(memory)

    throughput = benches.add_parser(
        "throughput",
        help="tokens a second on the same requests with the same cache",
        description=BENCH_THROUGHPUT_DESCRIPTION,
        epilog=BENCH_THROUGHPUT_EXAMPLES,
        formatter_class=raw,
    )
    throughput.set_defaults(run=run_bench_throughput)
    add = throughput.add_argument
    add("--layers", type=positive, default=8, metavar="N", help="of the model (default: 8)")
    add("--hidden", type=positive, default=512, metavar="D", help="hidden size, a multiple of 64 (default: 512)")
    add("--loops", type=loop_list, default=[4, 8], metavar="T,T", help="depths (default: 4,8)")
    add(
        "--cache",
        type=words_of("scarce", "plentiful"),
        default=["scarce", "plentiful"],
        metavar="CACHE,CACHE",
        help="scarce: few requests of the LoopLM fit; plentiful: all do (default: scarce,plentiful)",
    )
    add("--fit", type=positive, default=6, metavar="N", help="LoopLM requests a scarce cache holds (default: 6)")
    add("--decode-mode", choices=("token", "chunk"), default="token", help="the MELT's (default: token)")
    add("--chunk-size", type=positive, default=32, metavar="C", help="the MELT's (default: 32)")
    add("--gate-rank", type=positive, metavar="R", help="of the MELT's gate, cut as by gate_rank (default: whole)")
    add("--requests", type=positive, default=32, metavar="N", help="all there from the start (default: 32)")
    add("--prompt", type=positive, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    add("--generated", type=positive, default=128, metavar="N", help="tokens of an answer (default: 128)")
    add("--rounds", type=positive, default=3, metavar="N", help="how often both serve all requests (default: 3)")
    add("--profile", action="store_true", help="show where the time of one more round goes")
    add_output(throughput)

    depth = benches.add_parser(
        "depth",
        help="time, cache and right answers with more or fewer loops",
        description=BENCH_DEPTH_DESCRIPTION,
        epilog=BENCH_DEPTH_EXAMPLES,
        formatter_class=raw,
    )
    depth.set_defaults(run=run_bench_depth)
    add = depth.add_argument
    add("--layers", type=positive, default=8, metavar="N", help="of the model (default: 8)")
    add("--hidden", type=positive, default=512, metavar="D", help="hidden size, a multiple of 64 (default: 512)")
    add("--loops", type=loop_list, default=[1, 2, 4, 8, 16], metavar="T,T", help="depths (default: 1,2,4,8,16)")
    add(
        "--mix",
        type=two_depths,
        metavar="T,T",
        help="half of the requests at the first, half at the second depth, against all at the second "
        "(default: 1,8, or 1 and the most of --loops where that is less)",
    )
    add("--decode-mode", choices=("token", "chunk"), default="token", help="default: token")
    add("--chunk-size", type=positive, default=32, metavar="C", help="default: 32; in chunk mode a multiple of 32")
    add("--requests", type=positive, default=16, metavar="N", help="all there from the start (default: 16)")
    add("--prompt", type=positive, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    add("--generated", type=positive, default=64, metavar="N", help="tokens of an answer (default: 64)")
    add("--rounds", type=positive, default=3, metavar="N", help="how often each depth serves them (default: 3)")
    add(
        "--accuracy",
        type=whole,
        default=0,
        metavar="N",
        help="also ask the bundled checkpoint N held-out questions at each depth it runs; 200 tell depths apart "
        "(default: 0, none)",
    )
    add_output(depth)

    kernels = benches.add_parser(
        "kernels",
        help="MELT's own arithmetic against what the device copies and multiplies",
        description=BENCH_KERNELS_DESCRIPTION,
        epilog=BENCH_KERNELS_EXAMPLES,
        formatter_class=raw,
    )
    kernels.set_defaults(run=run_bench_kernels)
    add = kernels.add_argument
    add_device(kernels)
    add("--tokens", type=loop_list, metavar="N,N", help="of a step (default: 64,16384; on a CPU 64,1024)")
    add("--batch", type=positive, default=64, metavar="N", help="sequences that a layer decodes (default: 64)")
    add("--context", type=positive, metavar="N", help="tokens each of them has (default: 1024; on a CPU 128)")
    add("--train-tokens", type=whole, metavar="N", help="of a step; 0: none (default: 2048; on a CPU 256)")
    add("--rounds", type=positive, default=5, metavar="N", help="of layers and training steps (default: 5)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute on a CPU")
    add_output(kernels)

    reference = benches.add_parser(
        "reference",
        help="the reference model's speed and memory over loops, on a GPU if there is one",
        description=BENCH_REFERENCE_DESCRIPTION,
        epilog=BENCH_REFERENCE_EXAMPLES,
        formatter_class=raw,
    )
    reference.set_defaults(run=run_bench_reference)
    add = reference.add_argument
    add_device(reference)
    add("--loops", type=loop_list, default=[1, 2, 4, 8, 16], metavar="T,T", help="depths (default: 1,2,4,8,16)")
    add("--batch", type=positive, default=8, metavar="N", help="sequences at once (default: 8)")
    add("--prompt", type=positive, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    add("--generated", type=positive, default=32, metavar="N", help="tokens of an answer (default: 32)")
    add("--rounds", type=positive, default=3, metavar="N", help="how often each depth generates (default: 3)")
    add_output(reference)


def add_device(bench: argparse.ArgumentParser) -> None:
    """Where a measurement without an engine runs, and on what."""
    bench.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one"
    )
    bench.add_argument(
        "--shape",
        choices=("small", "melt-1.6b"),
        help="sizes of the model; small is 2 layers of d=256 (default: melt-1.6b on a GPU, small on a CPU)",
    )


def add_output(bench: argparse.ArgumentParser) -> None:
    """What every measurement can leave behind."""
    bench.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, as .png, .svg or .pdf")
    bench.add_argument("--json", action="store_true", help="end with one line of JSON")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number."""
    return 0 if text == "0" else positive(text)


def loop_list(text: str) -> list[int]:
    """Depths such as `1,2,4`."""
    return [positive(word) for word in text.split(",")]


def two_depths(text: str) -> tuple[int, int]:
    """Depths such as `1,8`."""
    depths = loop_list(text)
    if len(depths) != 2 or depths[0] >= depths[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not two depths, the smaller first")
    return depths[0], depths[1]


def threshold_list(text: str) -> list[float]:
    """Exit thresholds with commas between them."""
    try:
        thresholds = [float(word) for word in text.split(",")]
    except ValueError:
        thresholds = []
    if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers above 0 and at most 1, with commas between them")
    return thresholds


def words_of(first: str, second: str) -> Callable[[str], list[str]]:
    """A parser of one or both of two words, such as `token,chunk`."""

    def word_list(text: str) -> list[str]:
        for word in text.split(","):
            if word not in (first, second):
                raise argparse.ArgumentTypeError(f"{word!r} is neither {first!r} nor {second!r}")
        return text.split(",")

    return word_list


def byte_count(text: str) -> int:
    """Bytes such as `4096`, `96M` or `2G`; K, M and G are powers of 1024."""
    digits, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
    return positive(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def run_convert(arguments: argparse.Namespace) -> int:
    """`melt-serve convert`."""
    from melt_serve.convert import ConversionError, convert

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
    except ConversionError as error:
        return fail(error)
    print(f"Wrote {arguments.target}. The gate is untrained; to serve it: melt-serve serve {arguments.target}")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """`melt-serve eval`."""
    from melt_serve.train import evaluate

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
    from melt_serve import plan

    try:
        config = plan.shape_of(arguments.model)
    except plan.PlanError as error:
        return fail(error)
    load = plan.Load(
        loops=arguments.loops or config.total_ut_steps,
        context=arguments.context,
        requests=arguments.requests,
        step_tokens=arguments.step_tokens,
        kv_dtype=arguments.kv_dtype,
        weight_bytes=plan.KV_BYTES[arguments.dtype],
    )
    chunk_size = arguments.chunk_size or getattr(config, "chunk_size", 512)
    device = None if arguments.device_memory is None else int(arguments.device_memory * plan.GB)
    plans = plan.compare(config, load, chunk_size, device)
    tokens = f"{load.requests:,} x {load.context:,} tokens"
    print(f"{arguments.model}, T={load.loops}, C={chunk_size}, {tokens}, rows in {load.kv_dtype}")
    print(plan.table(plans))
    if arguments.json:
        print(json.dumps({"rows": [{**asdict(each), "total": each.total} for each in plans]}))
    return 0


def run_bench_memory(arguments: argparse.Namespace) -> int:
    """`melt-serve bench memory`."""
    from melt_serve.bench import memory

    options = memory.Options(
        shape=arguments.shape,
        loops=arguments.loops,
        models=arguments.models,
        kv_dtypes=arguments.kv_dtype,
        kv_memory=arguments.kv_cache_memory,
        chunk_size=arguments.chunk_size,
        context=arguments.context,
        step_tokens=arguments.step_tokens,
    )
    return run_bench(
        arguments,
        measure=lambda: memory.measure(options),
        text=memory.table,
        figure=memory.figure,
        facts=lambda rows: {"rows": [asdict(row) for row in rows]},
    )


def run_bench_throughput(arguments: argparse.Namespace) -> int:
    """`melt-serve bench throughput`."""
    from melt_serve.bench import throughput

    options = throughput.Options(
        layers=arguments.layers,
        hidden=arguments.hidden,
        loops=arguments.loops,
        caches=arguments.cache,
        decode_mode=arguments.decode_mode,
        chunk_size=arguments.chunk_size,
        requests=arguments.requests,
        prompt=arguments.prompt,
        generated=arguments.generated,
        rounds=arguments.rounds,
        fit=arguments.fit,
        profile=arguments.profile,
        gate_rank=arguments.gate_rank,
    )
    return run_bench(
        arguments,
        measure=lambda: throughput.measure(options),
        text=lambda rows: "\n\n".join(
            [throughput.table(rows), *(throughput.profile_table(row) for row in rows if row.melt_profile)]
        ),
        figure=throughput.figure,
        facts=lambda rows: {"rows": [{**asdict(row), "ratio": row.ratio} for row in rows]},
    )


def run_bench_depth(arguments: argparse.Namespace) -> int:
    """`melt-serve bench depth`."""
    from melt_serve.bench import depth

    options = depth.Options(
        layers=arguments.layers,
        hidden=arguments.hidden,
        loops=arguments.loops,
        mix=arguments.mix,
        decode_mode=arguments.decode_mode,
        chunk_size=arguments.chunk_size,
        requests=arguments.requests,
        prompt=arguments.prompt,
        generated=arguments.generated,
        rounds=arguments.rounds,
        questions=arguments.accuracy,
    )
    return run_bench(
        arguments,
        measure=lambda: depth.measure(options),
        text=lambda measured: depth.table(*measured, options.base),
        figure=lambda measured: depth.figure(measured[0], options.base),
        facts=lambda measured: depth.facts(*measured),
    )


def run_bench_kernels(arguments: argparse.Namespace) -> int:
    """`melt-serve bench kernels`."""
    from melt_serve.bench import kernels

    options = kernels.Options(
        device=arguments.device,
        shape=arguments.shape,
        tokens=arguments.tokens,
        batch=arguments.batch,
        context=arguments.context,
        train_tokens=arguments.train_tokens,
        rounds=arguments.rounds,
        compiled=not arguments.no_compile,
    )
    return run_bench(
        arguments,
        measure=lambda: kernels.measure(options),
        text=kernels.table,
        figure=kernels.figure,
        facts=kernels.facts,
    )


def run_bench_reference(arguments: argparse.Namespace) -> int:
    """`melt-serve bench reference`."""
    from melt_serve.bench import reference

    options = reference.Options(
        device=arguments.device,
        shape=arguments.shape,
        loops=arguments.loops,
        batch=arguments.batch,
        prompt=arguments.prompt,
        generated=arguments.generated,
        rounds=arguments.rounds,
    )
    return run_bench(
        arguments,
        measure=lambda: reference.measure(options),
        text=reference.table,
        figure=reference.figure,
        facts=reference.facts,
    )


def run_bench(
    arguments: argparse.Namespace,
    measure: Callable[[], Measured],
    text: Callable[[Measured], str],
    figure: Callable[[Measured], "Figure"],
    facts: Callable[[Measured], dict[str, object]],
) -> int:
    """Measure, then show it in every way that was asked for."""
    from melt_serve.bench.engine import BenchError
    from melt_serve.bench.plots import refuse_plot, write

    try:
        if arguments.plot:
            refuse_plot(arguments.plot)
        measured = measure()
    except BenchError as error:
        return fail(error)
    print(text(measured))
    if arguments.plot:
        write(figure(measured), arguments.plot)
    if arguments.json:
        print(json.dumps(facts(measured)))
    return 0


def run_serve(words: Sequence[str]) -> int:
    """`melt-serve serve`."""
    from melt_serve.serve import main

    return main(list(words))


def run_demo(words: Sequence[str]) -> int:
    """`melt-serve demo`."""
    from melt_serve.demo import main

    return main(list(words))


def fail(error: Exception) -> int:
    """Say what went wrong in one line; the exit code of a failure."""
    print("melt-serve: error:", " ".join(str(error).split()), file=sys.stderr)
    return 1


# argparse would take flags such as --help for itself, so these two never reach it.
PASSED_THROUGH: dict[str, Handler] = {"serve": run_serve, "demo": run_demo}


if __name__ == "__main__":
    sys.exit(main())
