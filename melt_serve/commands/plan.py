"""`melt-serve plan`: its flags."""

import argparse

from melt_serve.terminal import Subcommands, add_command, fail, positive, print_json

DESCRIPTION = """\
Show what each part of a model takes of a device's memory, as a MELT in both decode modes, as a LoopLM, and as a plain
transformer of the same shape. Arithmetic only: nothing is loaded. GB are 10^9 bytes."""

EXAMPLES = """\
examples:
  melt-serve plan
      Ouro-1.4B's shape at 4 loops, one request of 32,000 tokens
  melt-serve plan ouro-2.6b --loops 8 --context 8192 --requests 64 --device-memory 80
      another shape and load, and how many requests fit in 80 GB
  melt-serve plan ./my-melt --kv-dtype fp8
      a checkpoint of your own, with FP8 rows"""


def add_plan(commands: "Subcommands[argparse.ArgumentParser]") -> None:
    """Add `plan` to the commands of `melt-serve`."""
    command = add_command(commands, "plan", "see what fits in a device's memory", DESCRIPTION, EXAMPLES)
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        default="ouro-1.4b",
        help="ouro-1.4b, ouro-2.6b, a folder, or OWNER/NAME on the hub",
    )
    add("--loops", type=positive, metavar="T", help="loops a token runs (default: the config's)")
    add("--context", type=positive, default=32000, metavar="N", help="tokens a request holds (default: 32000)")
    add("--requests", type=positive, default=1, metavar="N", help="requests at once (default: 1)")
    add("--chunk-size", type=positive, metavar="C", help="the MELT's (default: the config's, or 512)")
    add("--step-tokens", type=positive, default=2048, metavar="N", help="--max-num-batched-tokens (default: 2048)")
    add(
        "--kv-dtype", choices=("float32", "bfloat16", "fp8"), default="bfloat16", help="of the rows (default: bfloat16)"
    )
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (default: bfloat16)")
    add("--device-memory", type=float, metavar="GB", help="also say how many requests fit in a server on this much")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        metavar="SHARE",
        help="of the device that vLLM may take (default: 0.92, as vLLM's)",
    )
    add("--json", action="store_true", help="end with one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print the plans; return the exit code."""
    from melt_serve import capacity

    try:
        config = capacity.shape_of(arguments.model)
    except capacity.PlanError as error:
        return fail(error, code=2)
    load = capacity.Load(
        loops=arguments.loops or config.total_ut_steps,
        context=arguments.context,
        requests=arguments.requests,
        step_tokens=arguments.step_tokens,
        kv_dtype=arguments.kv_dtype,
        weight_bytes=capacity.KV_BYTES[arguments.dtype],
    )
    chunk_size = arguments.chunk_size or getattr(config, "chunk_size", 512)
    if not 0 < arguments.gpu_memory_utilization <= 1:
        return fail("--gpu-memory-utilization is a share, above 0 and at most 1", code=2)
    device = None if arguments.device_memory is None else int(arguments.device_memory * capacity.GB)
    try:
        plans = capacity.compare(config, load, chunk_size, device, arguments.gpu_memory_utilization)
    except capacity.PlanError as error:
        return fail(error, code=2)
    tokens = f"{load.requests:,} x {load.context:,} tokens"
    print(f"{arguments.model}, T={load.loops}, C={chunk_size}, {tokens}, rows in {load.kv_dtype}")
    print(capacity.table(plans))
    if device is not None:
        print(
            f"An estimate: vLLM takes {arguments.gpu_memory_utilization:.0%} of {arguments.device_memory:g} GB; "
            "working is a step's activations, logits, the device's context and graphs, counted and not measured."
        )
    if arguments.json:
        print_json(plans)
    return 0
