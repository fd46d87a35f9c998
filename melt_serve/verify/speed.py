"""Tokens a second of this checkpoint's shape against its LoopLM, and by depth: the measurements of `bench`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from melt_serve.bench import depth, kernels, throughput
from melt_serve.bench.engine import BenchError
from melt_serve.bench.shapes import DEPENDS_ON_THE_ENGINE, MODELS, Checkpoint, Model
from melt_serve.config import MeltConfig, kv_bytes_per_token, shape_facts
from melt_serve.verify.record import Check
from melt_serve.verify.served import Target

SHARE_OF_BOUND = 0.5
"""Of the ratio that arithmetic alone allows: less means that something other than the model takes the time."""
LATER_LOOPS = 0.9
"""The most time that one loop may take of what the most loops take."""
ROUNDS = 3
VALUE_BYTES = 2
"""`bench` serves in bfloat16."""


@dataclass(frozen=True)
class ThroughputOptions(throughput.Options):
    """Options of `bench throughput` with the sizes of a checkpoint."""

    facts: Mapping[str, object] | None = None

    def checkpoint(self, model: Model, loops: int) -> Checkpoint:
        """Return one of the two models, at some depth."""
        return checkpoint_of(self.facts, model, loops, self)


@dataclass(frozen=True)
class DepthOptions(depth.Options):
    """Options of `bench depth` with the sizes of a checkpoint."""

    facts: Mapping[str, object] | None = None

    def checkpoint(self, model: Model) -> Checkpoint:
        """Return a model with random weights, for up to the most loops."""
        return checkpoint_of(self.facts, model, max(self.loops), self)


def checkpoint_of(
    facts: Mapping[str, object] | None, model: Model, loops: int, options: throughput.Options | depth.Options
) -> Checkpoint:
    """Return a model with a checkpoint's sizes and random weights."""
    mode = options.decode_mode if model == "melt" else None
    return Checkpoint(facts or {}, model, loops, options.chunk_size, mode)


def check_speed(target: Target) -> Iterator[Check]:
    """Serve the same requests with this MELT's shape and its LoopLM's, then at one and at the most loops."""
    try:
        yield from check_throughput(target)
        yield from check_depths(target)
    except BenchError as error:
        yield Check.judge("speed", False, " ".join(str(error).split()), "measured")


def check_throughput(target: Target) -> Iterator[Check]:
    """Serve the same requests with both, few and many at once, each in turn, where the cache has room for all."""
    config, loops = target.config, target.config.total_ut_steps
    assert isinstance(config, MeltConfig)
    counts = (1, 16, 64) if target.cuda else (1, 4, 16)
    options = ThroughputOptions(
        facts=sizes_of(config),
        chunk_size=config.chunk_size,
        decode_mode=config.decode_mode,
        loops=(loops,),
        requests=max(counts),
        prompt=64,
        generated=64 if target.cuda else 32,
    )
    bound = throughput.work(options, "looplm", loops) / throughput.work(options, "melt", loops)
    least = SHARE_OF_BOUND * bound
    with throughput.both_engines(options, "plentiful", loops) as engines:
        for requests in counts:
            few = replace(options, requests=requests)
            seconds: dict[Model, list[float]] = {model: [] for model in MODELS}
            for number in range(ROUNDS):
                for model in MODELS if number % 2 else reversed(MODELS):
                    work = throughput.generate_arguments(few, seed=2 + number + 100 * requests)
                    seconds[model].append(engines[model].ask("generate", **work))
            ratios = depth.ratios(seconds["looplm"], seconds["melt"])
            rates = {model: requests * few.generated / median(each) for model, each in seconds.items()}
            yield Check.judge(
                f"MELT / LoopLM, {loops} loops, {requests} request{'s' if requests > 1 else ''} at once",
                median(ratios) >= least,
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}): "
                f"{rates['melt']:,.0f} against {rates['looplm']:,.0f} tokens a second",
                f"at least {least:.2f}, half of what arithmetic allows",
                ratio=median(ratios),
                requests=requests,
                loops=loops,
                melt_tokens_per_second=rates["melt"],
                looplm_tokens_per_second=rates["looplm"],
            )


def check_depths(target: Target) -> Iterator[Check]:
    """Serve the same requests at every depth with one engine, and count the KV blocks it gives away."""
    config, most = target.config, target.most_loops
    assert isinstance(config, MeltConfig)
    loops = sorted({1, config.total_ut_steps, most})
    options = DepthOptions(
        facts=sizes_of(config),
        models=["melt"],
        chunk_size=config.chunk_size,
        decode_mode=config.decode_mode,
        loops=loops,
        requests=16 if target.cuda else 8,
        prompt=64,
        generated=32,
    )
    results: Sequence[depth.Result] = depth.measure(options).results
    expected = kv_bytes_per_token(config, VALUE_BYTES)
    held = {str(result.loops): result.kv_bytes_per_token for result in results}
    yield Check.judge(
        f"KV bytes a token at {', '.join(held)} loops, as blocks are given away",
        set(held.values()) == {expected},
        ", ".join(f"{each:,}" for each in held.values()),
        f"{expected:,} at each",
        bytes_by_loops=held,
    )
    if most > 1:
        rates = {str(result.loops): result.tokens_per_second for result in results}
        share = rates[str(most)] / rates["1"]
        yield Check.judge(
            f"time at 1 loop / at {most}",
            share <= LATER_LOOPS,
            f"{share:.2f}: " + ", ".join(f"{rate:,.0f} tokens a second at {name}" for name, rate in rates.items()),
            f"at most {LATER_LOOPS}",
            tokens_per_second_by_loops=rates,
        )


def sizes_of(config: MeltConfig) -> dict[str, object]:
    """Return a checkpoint's sizes, as `bench` takes them."""
    own = ("chunk_size", "decode_mode", *DEPENDS_ON_THE_ENGINE)
    return {key: value for key, value in shape_facts(config).items() if key not in own}


def check_kernels(cuda: bool) -> Iterator[Check]:
    """Hold MELT's kernels against what the device copies; its goals are for one kind of GPU."""
    if not cuda:
        yield Check.skip("kernels against copy bandwidth", "Triton's kernels run on a GPU")
        return
    try:
        measured = kernels.measure(kernels.Options(train_tokens=0))
    except BenchError as error:
        yield Check.judge("kernels against copy bandwidth", False, " ".join(str(error).split()), "measured")
        return
    for part in measured.parts:
        yield Check.judge(
            f"{part.name}, {part.tokens:,} tokens",
            part.goal is None or part.share >= part.goal,
            f"{part.share:.0%} of the {measured.rates.copy / 1e9:,.0f} GB/s that the device copies",
            "-" if part.goal is None else f"at least {part.goal:.0%}",
            share=part.share,
            bytes_per_second=measured.rates.copy,
        )
