"""`melt-serve bench kernels`: MELT's own arithmetic, held against what the same device copies and multiplies.

Everything is measured in one process on one device. Weights and states are random. `--help` reads this, so PyTorch is
imported only when something is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import BenchError
from melt_serve.bench.options import DeviceOptions, flag
from melt_serve.bench.report import judged, spread
from melt_serve.bench.shapes import shape
from melt_serve.terminal import columns, loop_list, positive, whole

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from melt_serve.bench.operators import Part
    from melt_serve.device import Rates

HELP = "MELT's own arithmetic against what the device copies and multiplies"
DESCRIPTION = """\
Time MELT's kernels and hold them against what the same device copies and multiplies, in one process: the gate, the
gate with its gradient, and RoPE with the write of K and V rows; each as PyTorch's eager operators, as torch.compile
makes it, and in Triton (on a GPU). Then a MELT layer against a LoopLM layer, decoding at T=4, and a training step of
phase 2 with the operations it needs. Goals are for an H200 and the paper's shape; elsewhere there are none."""
EXAMPLES = """\
examples:
  melt-serve bench kernels
      on a GPU, if there is one, the paper's shape; on a CPU two layers of d=256, which takes some minutes
  melt-serve bench kernels --tokens 64,512 --batch 8 --context 128 --train-tokens 0 --no-compile --json
      smaller and quicker, without a training step and torch.compile, and one line of JSON at the end
  melt-serve bench kernels --device cuda --plot kernels.png
      also draw every version beside the time in which the device copies as many bytes"""

GOALS_ON = "H200"
COPY_GOAL = 0.8
LAYER_GOAL = 1.15
TRAINING_GOAL = 0.35
LOOPS = 4


@dataclass(frozen=True)
class Options(DeviceOptions):
    """What to measure; None is what suits the device, see `on`."""

    tokens: Sequence[int] | None = flag(
        None, "tokens of a step, for each kernel (default: 64,16384; on a CPU 64,1024)", loop_list, "N,N"
    )
    batch: int = flag(64, "sequences that a layer decodes", positive, "N")
    context: int | None = flag(None, "tokens each of them has (default: 1024; on a CPU 128)", positive, "N")
    train_tokens: int | None = flag(
        None, "tokens of a training step; 0: none (default: 2048; on a CPU 256)", whole, "N"
    )
    rounds: int = flag(5, "how often layers and training steps are timed", positive, "N")
    compiled: bool = flag(True, "leave out torch.compile, which takes a minute on a CPU", name="--no-compile")

    def on(self, device: "torch.device") -> "Options":
        """Return these options with every None replaced by the device's default."""
        gpu = device.type == "cuda"
        return replace(
            self,
            shape=self.shape_on(device),
            tokens=self.tokens or ((64, 16384) if gpu else (64, 1024)),
            context=self.context or (1024 if gpu else 128),
            train_tokens=(2048 if gpu else 256) if self.train_tokens is None else self.train_tokens,
        )


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

    rates: "Rates"
    shape: str
    parts: "Sequence[Part]"
    layer_seconds: dict[str, float]
    layer_ratios: Sequence[float]
    training_seconds: float | None
    training_operations: int
    training_share: float | None
    judged: bool

    @property
    def layer_ratio(self) -> float:
        """The median of `layer_ratios`."""
        return median(self.layer_ratios)


def measure(options: Options) -> Measured:
    """Measure everything, on one device.

    Raises:
        BenchError: not enough memory, or `MELT_KERNELS` says what is not to be measured.
        DeviceError: no such device.
    """
    import torch

    from melt_serve.bench.layers import measure_layers, measure_training
    from melt_serve.bench.operators import gate_part, gradient_part, rows_part
    from melt_serve.config import MeltConfig
    from melt_serve.device import device_of, measure_rates
    from melt_serve.kernels.dispatch import chosen

    device = device_of(options.device)
    if chosen() != "auto":
        raise BenchError(f"MELT_KERNELS={chosen()}: every version is measured here; unset it")
    options = options.on(device)
    assert options.tokens and options.context and options.train_tokens is not None and options.shape
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
            layer_times = measure_layers(config, options.batch, options.context, options.rounds, device, progress)
            progress.set_description("training step")
            step, operations = None, 0
            if options.train_tokens:
                step, operations = measure_training(config, sizes, options.train_tokens, options.rounds, device)
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


def table(measured: Measured) -> str:
    """Show what was measured, and the goals; microseconds, and 10^9 bytes or operations a second."""
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
                judged(each.goal, each.share),
            )
        )
    whole: list[tuple[str, ...]] = [("whole", "MELT", "LoopLM", "result", "min", "max", "goal")]
    whole.append(
        (
            f"layer, T={LOOPS}, decode",
            *(f"{measured.layer_seconds[name] * 1e6:,.0f} us" for name in ("melt", "looplm")),
            *spread(measured.layer_ratios),
            judged(LAYER_GOAL if measured.judged else None, measured.layer_ratio, at_most=True),
        )
    )
    if measured.training_seconds is not None and measured.training_share is not None:
        whole.append(
            (
                "phase-2 step",
                f"{measured.training_seconds * 1e3:,.0f} ms",
                "-",
                f"{measured.training_share:.0%} of matmul rate",
                "-",
                "-",
                judged(TRAINING_GOAL if measured.judged else None, measured.training_share),
            )
        )
    head = (
        f"{rates.device}, shape {measured.shape}, bfloat16: copies {rates.copy / 1e9:,.1f} GB/s, "
        f"multiplies {rates.matmul / 1e9:,.2f} GFLOP/s"
    )
    return "\n\n".join([head, columns(lines), columns(whole)])


def figure(measured: Measured) -> "Figure":
    """Draw the times of all versions beside the time in which the device copies as many bytes."""
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
