"""`melt-serve bench reference`: the reference model, with the kernels, generating with more and more loops.

`--help` reads this, so PyTorch is imported only when something is measured.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import BenchError
from melt_serve.bench.options import DeviceOptions, flag
from melt_serve.bench.report import set_loop_axis, spread, verdict
from melt_serve.bench.shapes import shape
from melt_serve.terminal import columns, loop_list, positive

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from melt_serve.train.distil.student import Student

HELP = "the reference model's speed and memory over loops, on a GPU if there is one"
DESCRIPTION = """\
Generate with the reference model, bfloat16, random weights, its gate a fused kernel on a GPU, at every depth: tokens a
second, the bytes of K and V rows at the end, and on a GPU its most memory in use, weights included."""
EXAMPLES = """\
examples:
  melt-serve bench reference --plot reference.png
      1 to 16 loops: on a GPU the paper's shape, 24 layers of d=2048; on a CPU 2 layers of d=256
  melt-serve bench reference --shape melt-1.6b --loops 1,4 --batch 1 --generated 8
      the true shape also on a CPU, which takes 4 GB of memory and its time"""


@dataclass(frozen=True)
class Options(DeviceOptions):
    """What to measure."""

    loops: Sequence[int] = flag((1, 2, 4, 8, 16), "depths", loop_list, "T,T")
    batch: int = flag(8, "sequences at once", positive, "N")
    prompt: int = flag(64, "tokens of a prompt", positive, "N")
    generated: int = flag(32, "tokens of an answer", positive, "N")
    rounds: int = flag(3, "how often each depth generates", positive, "N")


@dataclass(frozen=True)
class Result:
    """One depth.

    Attributes:
        device: its name.
        shape: the model's.
        rates: generated tokens a second, in each round, the prompt's time included.
        row_bytes: K and V rows that the cache held at the end.
        peak_bytes: the most GPU memory in use, weights included; None on a CPU.
    """

    device: str
    shape: str
    loops: int
    rates: Sequence[float]
    row_bytes: int
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """The median of `rates`."""
        return median(self.rates)


def measure(options: Options) -> list[Result]:
    """Generate greedily at every depth with one model, random weights, bfloat16, `token` mode.

    Raises:
        BenchError: not enough memory.
        DeviceError: no such device.
    """
    import torch

    from melt_serve.config import MeltConfig
    from melt_serve.device import device_of, forget_peak, name_of, peak_memory
    from melt_serve.train.distil.student import Student

    device = device_of(options.device)
    name = options.shape_on(device)
    sizes = {**shape(name), "total_ut_steps": max(options.loops)}
    torch.manual_seed(0)
    results = []
    try:
        with torch.device(device):
            model = Student(MeltConfig(**sizes)).to(torch.bfloat16).eval()
            prompt = torch.randint(model.config.vocab_size, (options.batch, options.prompt))
        generate(model, prompt, loops=2, tokens=2)  # compile and allocate
        depths = sorted(set(options.loops))
        for loops in tqdm(depths, unit="depth", disable=None):
            forget_peak(device)
            served = [generate(model, prompt, loops, options.generated) for _ in range(options.rounds)]
            peak = peak_memory(device) if device.type == "cuda" else None
            rates = [options.batch * options.generated / seconds for seconds, _ in served]
            results.append(Result(name_of(device), name, loops, rates, served[-1][1], peak))
    except torch.OutOfMemoryError as error:
        raise BenchError(f"{error}; lower --batch, --prompt or --generated") from None
    return results


def generate(model: "Student", prompt: "torch.Tensor", loops: int, tokens: int) -> tuple[float, int]:
    """Generate tokens for each sequence; return the seconds that took, and the bytes of the rows in the end.

    Args:
        prompt: [B, S].
        tokens: of each sequence.
    """
    import torch

    from melt_serve.modeling import MeltRows

    cache = MeltRows(model.config, len(prompt), prompt.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            loops=loops,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
    output[0, -1].item()  # waits for the device
    seconds = time.perf_counter() - begun
    return seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def table(results: Sequence[Result]) -> str:
    """Show the results in columns; MB are 10^6 bytes."""
    lines: list[tuple[str, ...]] = [("T", "tok/s", "min", "max", "K and V rows", "peak memory")]
    for result in results:
        peak = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.0f} MB"
        lines.append((str(result.loops), *spread(result.rates, digits=1, unit=""), f"{result.row_bytes:,} B", peak))
    parts = [f"{results[0].device}, shape {results[0].shape}, bfloat16, token mode", columns(lines)]
    if len(results) > 1:
        same = len({result.row_bytes for result in results}) == 1
        parts.append(f"rows the same at every depth: {verdict(same)}")
    return "\n\n".join(parts)


def figure(results: Sequence[Result]) -> "Figure":
    """Draw throughput and memory over the loops."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4), layout="constrained")
    rate, held = drawn.subplots(1, 2)
    loops = [result.loops for result in results]
    set_loop_axis(rate, "generated tokens a second", loops)
    set_loop_axis(held, "memory, MB", loops)
    rate.plot(loops, [result.tokens_per_second for result in results], marker="o")
    held.plot(loops, [result.row_bytes / 1e6 for result in results], marker="o", label="K and V rows")
    if results[0].peak_bytes is not None:
        peaks = [(result.peak_bytes or 0) / 1e6 for result in results]
        held.plot(loops, peaks, marker="s", label="peak, weights included")
    for axes in (rate, held):
        axes.set_ylim(bottom=0)
    held.legend()
    drawn.suptitle(f"{results[0].device}, shape {results[0].shape}")
    return drawn
