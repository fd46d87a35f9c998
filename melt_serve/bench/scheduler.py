"""`melt-serve bench scheduler`: what the scheduler costs a step, of MELTs in both modes and of LoopLMs, without models.

`--help` reads this, so vLLM is imported only when something is measured.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from melt_serve.bench.engine import BenchError
from melt_serve.bench.options import flag
from melt_serve.bench.report import draw_spread, judged, set_loop_axis, spread
from melt_serve.bench.shapes import BLOCK_SIZE, Checkpoint, shape
from melt_serve.terminal import columns, loop_list, positive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from melt_serve.config import DecodeMode, LoopLMConfig
    from melt_serve.engine.depth_scheduler import DepthScheduler

HELP = "what the scheduler costs a step, by the most loops of a checkpoint"
DESCRIPTION = """\
Time the scheduler's part of a step, in which every request generates a token: the scheduler and the cache manager that
a server has, in this process, without a model; in processor time, of which other work on the machine takes nothing.
Shown is chunk mode at each number of loops that a checkpoint may be built for, and a LoopLM, whose requests have blocks
for each of their loops, against token mode, in which one block holds all. All take turns, step by step."""
EXAMPLES = """\
examples:
  melt-serve bench scheduler
      256 requests of one loop, on checkpoints built for 2, 4, 8 and 16 loops; takes a minute
  melt-serve bench scheduler --loops 2 --max-loops 2,16
      requests of two loops, which hold open rows, or two blocks for each of their tokens
  melt-serve bench scheduler --requests 64 --rounds 9 --plot scheduler.png --json
      fewer requests and more rounds, with a figure, and one line of JSON at the end"""

GOAL = 1.3
"""The most that chunk mode, or a LoopLM, should cost of token mode, for requests of one loop."""
CHUNK_SIZE = 64
PROMPT = 40
BLOCKS = 65536


@dataclass(frozen=True)
class Options:
    """What to measure."""

    requests: int = flag(256, "that generate in every step", positive, "N")
    loops: int = flag(1, "of every request", positive, "T")
    max_loops: Sequence[int] = flag((2, 4, 8, 16), "loops that checkpoints are built for", loop_list, "T,T")
    steps: int = flag(60, "timed in a round", positive, "N")
    rounds: int = flag(5, "medians that are taken", positive, "N")


@dataclass(frozen=True)
class Result:
    """One checkpoint's scheduler.

    Attributes:
        decode_mode: None for a LoopLM.
        seconds: a step's median, in each round, of processor time.
        ratios: that over token mode's, in each round.
        blocks: KV blocks that all requests hold.
        open_blocks: of these, for open rows.
        judged: whether the goal, which is for requests of one loop, is this one's.
    """

    decode_mode: "DecodeMode | None"
    max_loops: int
    seconds: Sequence[float]
    ratios: Sequence[float]
    blocks: int
    open_blocks: int
    judged: bool

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return median(self.ratios)


def measure(options: Options) -> list[Result]:
    """Time every checkpoint's scheduler, token mode's first.

    Raises:
        BenchError: requests would run more loops than a checkpoint is built for.
    """
    if options.loops > min(options.max_loops):
        raise BenchError(f"--loops={options.loops} is above the least of --max-loops, {min(options.max_loops)}")
    tokens = PROMPT + 2 + options.rounds * options.steps
    own, loops = -(-tokens // BLOCK_SIZE), options.loops
    most = options.requests * max(own + (loops - 1) * CHUNK_SIZE // BLOCK_SIZE, own * loops)
    if most > BLOCKS:
        raise BenchError(f"this needs {most:,} KV blocks, and there are {BLOCKS:,}: ask for fewer requests or steps")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported
    kinds: list[tuple[DecodeMode | None, int]] = [("token", max(options.max_loops))]
    kinds += [("chunk", loops) for loops in sorted(options.max_loops)]
    kinds += [(None, max(options.max_loops))]
    checkpoints = [
        Checkpoint(shape("demo"), "melt" if mode else "looplm", loops, CHUNK_SIZE, mode) for mode, loops in kinds
    ]
    schedulers = [start_scheduler(checkpoint.config, options.requests, tokens) for checkpoint in checkpoints]
    for scheduler in schedulers:
        add_requests(scheduler, options.requests, options.loops, tokens - PROMPT)
        run_step(scheduler)  # all prompts
    seconds: list[list[float]] = [[] for _ in kinds]
    for _ in tqdm(range(options.rounds), unit="round", disable=None):
        steps = [[run_step(scheduler) for scheduler in schedulers] for _ in range(options.steps)]
        for each, times in zip(seconds, zip(*steps, strict=True), strict=True):
            each.append(median(times))
    return [
        Result(
            decode_mode=mode,
            max_loops=loops,
            seconds=each,
            ratios=[one / base for one, base in zip(each, seconds[0], strict=True)],
            blocks=blocks_in_use(scheduler),
            open_blocks=blocks_in_use(scheduler, since_group=1),
            judged=options.loops == 1 and mode != "token",
        )
        for (mode, loops), scheduler, each in zip(kinds, schedulers, seconds, strict=True)
    ]


def blocks_in_use(scheduler: "DepthScheduler", since_group: int = 0) -> int:
    """Return how many KV blocks all requests hold, in this cache group and later ones."""
    groups = scheduler.kv_cache_manager.coordinator.single_type_managers[since_group:]
    return sum(len(blocks) for group in groups for blocks in group.req_to_blocks.values())


def start_scheduler(config: "LoopLMConfig", requests: int, tokens: int) -> "DepthScheduler":
    """Start what a server of this checkpoint would have, with cache groups as of a model of one layer.

    Args:
        config: the checkpoint's.
        requests: that may run at once.
        tokens: the most that one may have.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from melt_serve.config import MeltConfig
    from melt_serve.engine.cache import FinalRowsSpec, OpenRowsSpec
    from melt_serve.engine.looplm_cache import LoopRowsSpec

    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        vllm_config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            max_model_len=tokens,
            max_num_seqs=requests,
            max_num_batched_tokens=max(requests * PROMPT, CHUNK_SIZE),  # all prompts in one step
            enforce_eager=True,
        ).create_engine_config()
    rows: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_kv_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "dtype": vllm_config.model_config.dtype,
    }
    specs: list[KVCacheSpec] = []
    if isinstance(config, MeltConfig):
        rows["chunk_size"] = config.chunk_size
        specs.append(FinalRowsSpec(**rows, decode_mode=config.decode_mode))
        if config.decode_mode == "chunk":
            specs.append(OpenRowsSpec(**rows, max_loops=config.most_loops))
    else:
        specs.append(LoopRowsSpec(**rows, max_loops=config.most_loops))
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    vllm_config.cache_config.num_gpu_blocks = BLOCKS
    return vllm_config.scheduler_config.get_scheduler_cls()(
        vllm_config,
        KVCacheConfig(BLOCKS, [], groups),
        StructuredOutputManager(vllm_config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


def add_requests(scheduler: "DepthScheduler", requests: int, loops: int, generated: int) -> None:
    """Add requests of prompts that share nothing."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from melt_serve.engine.depth import resolve_depth

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    sampling = SamplingParams(max_tokens=generated, ignore_eos=True, extra_args={"loops": loops})
    sampling = resolve_depth(sampling, scheduler.vllm_config.model_config.hf_config)
    for number in range(requests):
        scheduler.add_request(Request(str(number), [number] * PROMPT, sampling, None, block_hasher=hasher))


def run_step(scheduler: "DepthScheduler") -> float:
    """Schedule a step and take a token of each request whose prompt is over; return the former's processor seconds."""
    from vllm.v1.outputs import ModelRunnerOutput

    started = time.thread_time()
    output = scheduler.schedule()
    seconds = time.thread_time() - started
    ids = list(output.num_scheduled_tokens)
    generated = [[] if scheduler.requests[each].is_prefill_chunk else [1] for each in ids]
    scheduler.update_from_output(
        output, ModelRunnerOutput(ids, {each: row for row, each in enumerate(ids)}, sampled_token_ids=generated)
    )
    return seconds


def table(results: Sequence[Result]) -> str:
    """Show the results in columns: milliseconds a step, and their ratio to token mode's."""
    lines: list[tuple[str, ...]] = [
        (
            "model",
            "max loops",
            "ms a step",
            "least",
            "most",
            "of token",
            "least",
            "most",
            "at most",
            "blocks",
            "open",
        )
    ]
    for result in results:
        lines.append(
            (
                f"MELT, {result.decode_mode} mode" if result.decode_mode else "LoopLM",
                str(result.max_loops),
                *spread([1e3 * each for each in result.seconds], unit=""),
                *spread(result.ratios),
                judged(GOAL if result.judged else None, result.ratio, at_most=True),
                f"{result.blocks:,}",
                f"{result.open_blocks:,}",
            )
        )
    return columns(lines)


def figure(results: Sequence[Result]) -> "Figure":
    """Draw what chunk mode costs of token mode, over the loops that checkpoints are built for."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5, 4), layout="constrained")
    axes = drawn.subplots()
    chunk = [result for result in results if result.decode_mode == "chunk"]
    set_loop_axis(axes, "a step of the scheduler, chunk mode over token mode", [each.max_loops for each in chunk])
    draw_spread(axes, [each.max_loops for each in chunk], [each.ratios for each in chunk])
    axes.axhline(GOAL, linestyle=":")
    return drawn
