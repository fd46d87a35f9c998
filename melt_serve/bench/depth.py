"""`melt-serve bench depth`: engines that are asked for more or fewer loops: time, rows, and right answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.accuracy import Answers, ask_bundled, depths_asked, trained_loops
from melt_serve.bench.depth_results import USUAL_LOOPS, Measured, Mix, Result, base_of, figure, table
from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.options import flag
from melt_serve.bench.shapes import BLOCK_SIZE, DTYPES, MODELS, VALUE_BYTES, Checkpoint, Dtype, Model, scaled_shape
from melt_serve.bench.throughput import STEP_TOKENS, refuse
from melt_serve.terminal import loop_list, positive, threshold_list, two_depths, whole, words_of

if TYPE_CHECKING:
    from melt_serve.config import DecodeMode

__all__ = ["DESCRIPTION", "EXAMPLES", "HELP", "Options", "figure", "measure", "table"]

HELP = "time, cache and right answers with more or fewer loops"
DESCRIPTION = """\
Serve the same requests at each depth with a MELT's engine, round by round, then with a LoopLM's. Each has random
weights and is built once, for the most loops; each request says its own. Shown are tokens a second, the time between
two tokens of a request that is alone, the time relative to 4 loops, and the KV cache that a token and a request's open
chunk take, counted in the blocks that the engine gave away. Then half of the requests think less than the others,
against all at the larger depth. With --accuracy the bundled checkpoints, which need their loops, answer questions, at
each depth and with tokens that exit early."""
EXAMPLES = """\
examples:
  melt-serve bench depth
      8 layers, d=512, 16 requests of 128 + 64 tokens, at 1 to 16 loops; takes 20 minutes or so on 2 quiet CPU cores
  melt-serve bench depth --accuracy 200 --plot depth.png
      also the share of right answers of the bundled checkpoints, as deep as they go, and a figure
  melt-serve bench depth --models melt --decode-mode chunk --chunk-size 64
      the other decode mode, in which an open chunk keeps rows of every loop
  melt-serve bench depth --loops 1,2,4 --mix 2,4 --layers 2 --requests 8 --generated 32 --json
      smaller and quicker, another mix, and one line of JSON at the end"""

TIME_GOALS = {1: 0.35}
"""The most time that a MELT should take at a depth of T=4's."""

MIX_GOALS = {(1, 8): 1.4}
"""What a MELT's throughput should gain where half of the requests think this much less than the others."""


@dataclass(frozen=True)
class Options:
    """What to measure; engines are built for the largest of the depths."""

    models: Sequence[Model] = flag(MODELS, "melt, looplm or both", words_of(*MODELS), "MODEL,MODEL")
    layers: int = flag(8, "layers of the model", positive, "N")
    hidden: int = flag(512, "hidden size, a multiple of 64", positive, "D")
    loops: Sequence[int] = flag((1, 2, 4, 8, 16), "depths", loop_list, "T,T")
    mix: tuple[int, int] | None = flag(
        None,
        "half of the requests at the first, half at the second depth, against all at the second "
        "(default: 1,8, or 1 and the most of --loops where that is less)",
        two_depths,
        "T,T",
    )
    decode_mode: "DecodeMode" = flag("token", "the MELT's", choices=("token", "chunk"))
    chunk_size: int = flag(32, "the MELT's, in chunk mode a multiple of 32", positive, "C")
    requests: int = flag(16, "requests, all there from the start", positive, "N")
    prompt: int = flag(128, "tokens of a prompt", positive, "N")
    generated: int = flag(64, "tokens of an answer", positive, "N")
    rounds: int = flag(3, "how often each depth serves them", positive, "N")
    dtype: Dtype = flag("bfloat16", "of weights and rows; many CPUs multiply float32 faster in batches", choices=DTYPES)
    questions: int = flag(
        0,
        "also ask the bundled checkpoints N held-out questions at each depth they run; 200 tell depths apart",
        whole,
        "N",
        name="--accuracy",
    )
    exit_thresholds: Sequence[float] = flag(
        (0.9, 0.5, 0.1), "that they are asked at, too, at their own loops", threshold_list, "Q,Q"
    )

    @property
    def depths(self) -> list[int]:
        """All depths, each once, the smallest first."""
        return sorted(set(self.loops))

    @property
    def mixed(self) -> tuple[int, int] | None:
        """The two depths of the mix; None if there is only one depth."""
        default = (1, min(8, max(self.loops)))
        return self.mix or (default if default[1] > 1 else None)

    @property
    def base(self) -> int:
        """The depth whose time is 1."""
        return base_of(self.depths)

    def checkpoint(self, model: Model) -> Checkpoint:
        """Return a model with random weights, for up to the most loops."""
        mode = self.decode_mode if model == "melt" else None
        return Checkpoint(scaled_shape(self.layers, self.hidden), model, max(self.loops), self.chunk_size, mode)


@dataclass(frozen=True)
class Served:
    """What one engine did.

    Attributes:
        held: bytes by work, as `Result` has them.
        seconds: of each round, by work.
        latencies: seconds between two tokens in each round, by depth.
    """

    held: dict[str, dict[str, int]]
    seconds: dict[str, list[float]]
    latencies: dict[int, list[float]]


def measure(options: Options) -> Measured:
    """Serve every round at every depth with an engine of each model; then ask the bundled checkpoints.

    Raises:
        BenchError: the options fit no engine, or one of them failed; the message names it.
    """
    refuse(options.hidden, options.chunk_size, options.decode_mode)
    refuse_depths(options)
    asked = {model: depths_asked(model, options.depths, options.exit_thresholds) for model in options.models}
    works = len(workloads(options))
    visits = len(options.models) * (works + options.rounds * (works + len(options.depths)))
    visits += sum(map(len, asked.values())) if options.questions else 0
    results: list[Result] = []
    mixes: list[Mix] = []
    answers: list[Answers] = []
    with tqdm(total=visits, unit="run", disable=None) as progress:
        for model in options.models:
            checkpoint = options.checkpoint(model)
            progress.set_description(f"{checkpoint}, starting")
            with Engine(str(checkpoint), checkpoint, engine_arguments(options, model)) as engine:
                engine.answer()
                served = serve(options, engine, progress)
            results += depth_results(options, model, served)
            mixes += mix_results(options, model, served)
        if options.questions:
            for model, depths in asked.items():
                answers += ask_bundled(model, depths, options.questions, options.decode_mode, progress)
    return Measured(results, mixes, answers)


def serve(options: Options, engine: Engine, progress: tqdm) -> Served:
    """Count the blocks of all works, which warms the engine up; then serve them in every round."""
    works = workloads(options)
    served = Served({}, {name: [] for name in works}, {loops: [] for loops in options.depths})
    for name in works:
        progress.set_description(f"{name}, blocks")
        served.held[name] = engine.ask("rows_held", **generate_arguments(options, 0, works[name]))
        progress.update()
    for number in range(1, options.rounds + 1):
        # Who goes first changes, so that a machine that slows down favours nobody.
        order = 1 if number % 2 else -1
        for name in list(works)[::order]:
            progress.set_description(name)
            served.seconds[name].append(engine.ask("generate", **generate_arguments(options, number, works[name])))
            progress.update()
        for loops in options.depths[::order]:
            progress.set_description(f"T={loops}, alone")
            lengths = {"prompt": options.prompt, "generated": options.generated}
            served.latencies[loops].append(engine.ask("latency", **lengths, seed=number, loops=loops))
            progress.update()
    return served


def refuse_depths(options: Options) -> None:
    """Refuse before the engines start what cannot be served or compared.

    Raises:
        BenchError: the option, and what it must be.
    """
    deepest = max(options.loops)
    if options.generated == 1:
        raise BenchError("--generated=1 leaves no time between two tokens to measure; it must be at least 2")
    if options.mixed is not None:
        if options.mixed[1] > deepest:
            raise BenchError(f"--mix={options.mixed[0]},{options.mixed[1]} is deeper than the {deepest} of --loops")
        if options.requests % 2:
            raise BenchError(f"--requests={options.requests} must be even: a mix has half of them at each depth")
    trained = max(trained_loops(model) for model in options.models)
    if options.questions and min(options.loops) > trained:
        raise BenchError(
            f"--accuracy={options.questions} asks the bundled checkpoints, which run at most {trained} loops: "
            f"none of --loops is as few"
        )


def workloads(options: Options) -> dict[str, list[int]]:
    """Return the loops of each request, by the name of the work."""
    works = {f"T={loops}": [loops] * options.requests for loops in options.depths}
    if options.mixed is None:
        return works
    # Neighbours in time, also where the deep one of the pair is among the depths: their ratio is the result.
    return {
        **works,
        "mix": [*options.mixed] * (options.requests // 2),
        "all deep": [options.mixed[1]] * options.requests,
    }


def generate_arguments(options: Options, seed: int, loops: list[int]) -> dict[str, object]:
    """Return a round's requests, as the worker's `generate` takes them; their prompts are the same at every depth."""
    return {
        "requests": options.requests,
        "prompt": options.prompt,
        "generated": options.generated,
        "seed": seed,
        "loops": loops,
    }


def engine_arguments(options: Options, model: Model) -> dict[str, object]:
    """Return vLLM's arguments, with room for all requests at once at the largest depth."""
    context = options.prompt + options.generated
    blocks = math.ceil(context / BLOCK_SIZE)
    if model == "melt" and options.decode_mode == "chunk":
        blocks += (max(options.loops) - 1) * options.chunk_size // BLOCK_SIZE
    block = BLOCK_SIZE * options.checkpoint(model).kv_bytes_per_token(VALUE_BYTES[options.dtype])
    return {
        # And one block more: vLLM never uses the first block of its pool.
        "kv_cache_memory_bytes": (options.requests * blocks + 1) * block,
        "block_size": BLOCK_SIZE,
        "max_model_len": context,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": options.requests,
        "dtype": options.dtype,
        "enable_prefix_caching": False,  # the same prompts come again
        "disable_log_stats": False,  # their clock tells the latency
    }


def depth_results(options: Options, model: Model, served: Served) -> list[Result]:
    """Gather what was measured of a model at each depth, and a MELT's goals."""
    goals = TIME_GOALS if model == "melt" and options.base == USUAL_LOOPS else {}
    tokens = options.requests * options.generated
    return [
        Result(
            model=model,
            loops=loops,
            decode_mode=options.decode_mode if model == "melt" else None,
            rates=[tokens / each for each in served.seconds[f"T={loops}"]],
            relative_times=ratios(served.seconds[f"T={loops}"], served.seconds[f"T={options.base}"]),
            time_goal=goals.get(loops),
            latency_seconds=median(served.latencies[loops]),
            **served.held[f"T={loops}"],
        )
        for loops in options.depths
    ]


def mix_results(options: Options, model: Model, served: Served) -> list[Mix]:
    """Gather what was measured of a model's mix, and a MELT's goal; nothing if there was no mix."""
    if options.mixed is None:
        return []
    tokens = options.requests * options.generated
    mix = Mix(
        model=model,
        loops=options.mixed,
        tokens_per_second=tokens / median(served.seconds["mix"]),
        deep_tokens_per_second=tokens / median(served.seconds["all deep"]),
        ratios=ratios(served.seconds["all deep"], served.seconds["mix"]),
        goal=MIX_GOALS.get(options.mixed) if model == "melt" else None,
        kv_bytes_per_token=served.held["mix"]["kv_bytes_per_token"],
    )
    return [mix]


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Divide times by others, round by round."""
    return [time / other for time, other in zip(times, others, strict=True)]
