"""`melt-serve bench kernels`: MELT's own arithmetic, held against what the same device copies and multiplies.

Everything is measured in one process on one device. Weights and states are random.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from melt_serve.bench.engine import BenchError
from melt_serve.bench.layers import BLOCK, measure_layers, measure_training, rotary_table
from melt_serve.bench.shapes import shape
from melt_serve.config import MeltConfig
from melt_serve.device import Rates, device_of, measure_rates, seconds
from melt_serve.kernels import gate, rows
from melt_serve.kernels.dispatch import chosen
from melt_serve.kernels.gate import gate_blend
from melt_serve.kernels.rows import RowWrite, write_rows
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOALS_ON = "H200"
COPY_GOAL = 0.8
LAYER_GOAL = 1.15
TRAINING_GOAL = 0.35
LOOPS = 4
VALUE_OPERATIONS = {"gate": 10, "gate and gradient": 24}
"""A value of h: sums, the sigmoid's exponential and division, the blend; and what the gradient adds to that."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        shape: `melt-1.6b`, the paper's; `small`, 2 layers of d=256; None for the first on a GPU, else the second.
        tokens: of a step, for each kernel; None for what suits the device, as with the others.
        batch: sequences that decode one token, for the layers.
        context: tokens that each of them has.
        train_tokens: of one training step; 0 leaves it out.
        rounds: how often layers and training steps are timed.
        compiled: also what torch.compile makes of the references; on a CPU that takes a minute.
    """

    device: str
    shape: str | None
    tokens: Sequence[int] | None
    batch: int
    context: int | None
    train_tokens: int | None
    rounds: int
    compiled: bool = True

    def on(self, device: torch.device) -> "Options":
        """The same with nothing left open."""
        gpu = device.type == "cuda"
        return replace(
            self,
            shape=self.shape or ("melt-1.6b" if gpu else "small"),
            tokens=self.tokens or ((64, 16384) if gpu else (64, 1024)),
            context=self.context or (1024 if gpu else 128),
            train_tokens=(2048 if gpu else 256) if self.train_tokens is None else self.train_tokens,
        )


@dataclass(frozen=True)
class Part:
    """One kernel on one number of tokens.

    Attributes:
        bytes: that it must at least read and write.
        operations: on single values.
        seconds: of a call, by version: `eager` and `compile` of its PyTorch reference, and `triton`; None where
            there is none.
        share: of the copy bandwidth that the version in use reaches: Triton's on a GPU, else `eager`.
        goal: for the share; None if there is none here.
    """

    name: str
    tokens: int
    bytes: int
    operations: int
    seconds: dict[str, float | None]
    share: float
    goal: float | None


@dataclass(frozen=True)
class Measured:
    """All of a run.

    Attributes:
        layer_ratios: a MELT layer's time over a LoopLM layer's, T=4, decoding, in each round.
        training_seconds: of a phase-2 step; None if left out.
        training_operations: in its matmuls and its attention.
        training_share: of the matmul rate.
        judged: whether the goals, which are for an H200 and the paper's shape, are this run's.
    """

    rates: Rates
    shape: str
    parts: Sequence[Part]
    layer_seconds: dict[str, float]
    layer_ratios: Sequence[float]
    training_seconds: float | None
    training_operations: int
    training_share: float | None
    judged: bool

    @property
    def layer_ratio(self) -> float:
        """The median round's."""
        return median(self.layer_ratios)


def measure(options: Options) -> Measured:
    """Measure everything, on one device.

    Raises:
        BenchError: no such device, not enough of its memory, or `MELT_KERNELS` says what is not to be measured.
    """
    device = device_of(options.device)
    if chosen() != "auto":
        raise BenchError(f"MELT_KERNELS={chosen()}: every version is measured here; unset it")
    options = options.on(device)
    assert options.tokens and options.train_tokens is not None and options.shape
    sizes = {**shape(options.shape), "total_ut_steps": LOOPS}
    config = MeltConfig(**sizes, chunk_size=max(1, min(512, options.train_tokens // 4)))
    torch.manual_seed(0)
    try:
        with tqdm(total=3 * len(options.tokens) + options.rounds + 3, unit="measurement", disable=None) as progress:
            progress.set_description("copy and matmul")
            rates = measure_rates(device)
            progress.update()
            judged = GOALS_ON in rates.device and options.shape == "melt-1.6b"
            parts = []
            for tokens in options.tokens:
                for make in (gate_part, gradient_part, rows_part):
                    progress.set_description(f"kernels, {tokens} tokens")
                    goal = COPY_GOAL if judged and tokens == max(options.tokens) else None
                    parts.append(make(config, tokens, device, rates, goal, options.compiled))
                    progress.update()
            progress.set_description("layers")
            layer_times = measure_layers(config, options, device, progress)
            progress.set_description("training step")
            step, operations = measure_training(config, sizes, options, device) if options.train_tokens else (None, 0)
            progress.update(2)
    except torch.OutOfMemoryError as error:
        raise BenchError(f"{error}; lower --batch, --context, --tokens or --train-tokens") from None
    return Measured(
        rates=rates,
        shape=options.shape,
        parts=parts,
        layer_seconds={name: median(each) for name, each in layer_times.items()},
        layer_ratios=[melt / other for melt, other in zip(layer_times["melt"], layer_times["looplm"], strict=True)],
        training_seconds=step,
        training_operations=operations,
        training_share=None if step is None else operations / step / rates.matmul,
        judged=judged,
    )


def gate_part(
    config: MeltConfig, tokens: int, device: torch.device, rates: Rates, goal: float | None, compiled: bool
) -> Part:
    """The gate: four states and a bias in, one state out."""
    *inputs, values = gate_inputs(config, tokens, device)
    with torch.no_grad():
        times = versions(device, gate.reference, gate_blend, inputs, compiled)
    return part("gate", tokens, 5 * values.nbytes + inputs[2].nbytes, values, times, rates, goal)


def gradient_part(
    config: MeltConfig, tokens: int, device: torch.device, rates: Rates, goal: float | None, compiled: bool
) -> Part:
    """The gate and its gradient: in the second pass five states in, three out, and a sum over the tokens for b_z."""
    *inputs, values = gate_inputs(config, tokens, device)
    leaves = [each.requires_grad_() for each in inputs]

    def learn(blend: Callable[..., Tensor]) -> Callable[..., object]:
        return lambda *leaves: torch.autograd.grad(blend(*leaves), leaves, values)

    times = versions(device, gate.reference, gate_blend, leaves, compiled, learn)
    return part("gate and gradient", tokens, 14 * values.nbytes, values, times, rates, goal)


def rows_part(
    config: MeltConfig, tokens: int, device: torch.device, rates: Rates, goal: float | None, compiled: bool
) -> Part:
    """RoPE on queries and keys, and the rows' write: queries in and out, keys and values in, rows out."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    dim, kv_heads = config.head_dim, config.num_key_value_heads
    q = torch.randn(tokens, config.num_attention_heads, dim, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, tokens, kv_heads, dim, dtype=torch.bfloat16, device=device)
    blocks = -(-tokens // BLOCK)
    cache = torch.zeros(blocks, BLOCK, kv_heads, 2 * dim, dtype=torch.bfloat16, device=device)
    slots = torch.randperm(blocks * BLOCK, device=device)[:tokens]
    arguments = (q, k, v, torch.arange(tokens, device=device), rotary_table(dim, tokens, device))
    arguments = (*arguments, *cache.split(dim, dim=-1), slots)
    with torch.no_grad():
        times = versions(device, two_steps, lambda *tensors: write_rows(RowWrite(*tensors)), arguments, compiled)
    moved = 2 * q.nbytes + 2 * (k.nbytes + v.nbytes) + arguments[4].nbytes + 2 * slots.nbytes
    operations = 3 * (q.numel() + k.numel())
    return part("RoPE and rows", tokens, moved, q, times, rates, goal, operations)


def two_steps(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """As the reference of `write_rows`, for slots that are all there: it waits for nothing."""
    cos, sin = table[positions].float()[:, None].chunk(2, dim=-1)
    q.copy_(rows.rotate(q, cos, sin))
    block, place = slots // BLOCK, slots % BLOCK
    rows.put(k_cache, block, place, rows.rotate(k, cos, sin), None)
    rows.put(v_cache, block, place, v, None)


def gate_inputs(config: MeltConfig, tokens: int, device: torch.device) -> list[Tensor]:
    """W_z n, U_z h, b_z, h, n; and something of the size of h for the gradient to come from."""
    states = torch.randn(5, tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
    bias = torch.randn(config.hidden_size, dtype=torch.bfloat16, device=device)
    from_input, from_state, h, n, gradient = states
    return [from_input, from_state, bias, h, n, gradient]


def versions(
    device: torch.device,
    reference: Callable[..., object],
    picked: Callable[..., object],
    arguments: Sequence[Tensor],
    compiled: bool,
    wrapped: Callable[[Callable[..., Tensor]], Callable[..., object]] = lambda run: run,
) -> dict[str, float | None]:
    """The time of every version; `picked` is Triton's where there is a GPU."""
    runs = {"eager": reference, "compile": torch.compile(reference) if compiled else None}
    runs["triton"] = picked if device.type == "cuda" else None
    times: dict[str, float | None] = {}
    for name, run in runs.items():
        if run is None:
            times[name] = None
            continue
        whole = wrapped(run)
        whole(*arguments)  # compile
        times[name] = seconds(partial(whole, *arguments), device)
    return times


def part(
    name: str,
    tokens: int,
    moved: int,
    values: Tensor,
    times: dict[str, float | None],
    rates: Rates,
    goal: float | None,
    operations: int | None = None,
) -> Part:
    """A line of the table."""
    used = times["triton"] or times["eager"]
    assert used is not None
    operations = VALUE_OPERATIONS[name] * values.numel() if operations is None else operations
    return Part(name, tokens, moved, operations, times, moved / used / rates.copy, goal)


def table(measured: Measured) -> str:
    """What was measured and what was asked of it; microseconds, and 10^9 bytes or operations a second."""
    rates = measured.rates
    lines: list[tuple[str, ...]] = [
        ("kernel", "tokens", "bytes", "operations", "eager", "compile", "triton", "of copy bandwidth", "goal")
    ]
    for each in measured.parts:
        lines.append(
            (
                each.name,
                f"{each.tokens:,}",
                f"{each.bytes:,}",
                f"{each.operations:,}",
                *(
                    "-" if time is None else f"{time * 1e6:,.1f} us"
                    for time in (each.seconds[version] for version in ("eager", "compile", "triton"))
                ),
                f"{each.share:.0%}",
                judged(each.goal, each.share >= (each.goal or 0)),
            )
        )
    ratios = measured.layer_ratios
    whole: list[tuple[str, ...]] = [("whole", "MELT", "LoopLM", "result", "min", "max", "goal")]
    whole.append(
        (
            f"layer, T={LOOPS}, decode",
            *(f"{measured.layer_seconds[name] * 1e6:,.0f} us" for name in ("melt", "looplm")),
            f"{measured.layer_ratio:.2f}x",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            judged(LAYER_GOAL if measured.judged else None, measured.layer_ratio <= LAYER_GOAL),
        )
    )
    if measured.training_seconds is not None and measured.training_share is not None:
        reached = measured.training_share >= TRAINING_GOAL
        whole.append(
            (
                "phase-2 step",
                f"{measured.training_seconds * 1e3:,.0f} ms",
                "-",
                f"{measured.training_share:.0%} of matmul rate",
                "-",
                "-",
                judged(TRAINING_GOAL if measured.judged else None, reached),
            )
        )
    head = (
        f"{rates.device}, shape {measured.shape}, bfloat16: copies {rates.copy / 1e9:,.1f} GB/s, "
        f"multiplies {rates.matmul / 1e9:,.2f} GFLOP/s"
    )
    return "\n\n".join([head, columns(lines), columns(whole)])


def judged(goal: float | None, reached: bool) -> str:
    """A goal in a table, and what became of it."""
    return "-" if goal is None else f"{goal:.2f} {'reached' if reached else 'missed'}"


def facts(measured: Measured) -> dict[str, object]:
    """The same for machines."""
    return {**asdict(measured), "layer_ratio": measured.layer_ratio}


def figure(measured: Measured) -> "Figure":
    """Times of all versions beside the time in which the device copies as many bytes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3.2 * len(measured.parts), 4), layout="constrained")
    for axes, each in zip(drawn.subplots(1, len(measured.parts), squeeze=False)[0], measured.parts, strict=True):
        times = {name: time * 1e6 for name, time in each.seconds.items() if time is not None}
        axes.bar(list(times), list(times.values()))
        axes.axhline(each.bytes / measured.rates.copy * 1e6, color="black", linestyle="--", label="copy of its bytes")
        axes.set(title=f"{each.name}, {each.tokens:,} tokens", ylabel="microseconds")
    axes.legend()
    drawn.suptitle(measured.rates.device)
    return drawn
