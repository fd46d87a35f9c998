"""`melt-serve bench`: its flags, and what a measurement leaves behind."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from melt_serve.terminal import byte_count, fail, loop_list, positive, two_depths, whole, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measured = TypeVar("Measured")

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
