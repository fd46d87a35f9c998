"""`melt-serve bench reference`: the reference model, with the kernels, generating with more and more loops."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from melt_serve.bench.engine import BenchError
from melt_serve.bench.shapes import shape
from melt_serve.config import MeltConfig
from melt_serve.device import device_of, name_of
from melt_serve.modeling import MeltRows
from melt_serve.terminal import columns
from melt_serve.train.distil.student import Student

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        shape: `melt-1.6b`, the paper's; `small`, 2 layers of d=256; None for the first on a GPU, else the second.
        loops: every T.
        batch: sequences at once.
        prompt: tokens each.
        generated: tokens each.
        rounds: how often each depth generates.
    """

    device: str
    shape: str | None
    loops: Sequence[int]
    batch: int
    prompt: int
    generated: int
    rounds: int


@dataclass(frozen=True)
class Row:
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
        """The median round's."""
        return median(self.rates)


def measure(options: Options) -> list[Row]:
    """Generate greedily at every depth with one model, random weights, bfloat16, `token` mode.

    Raises:
        BenchError: no such device, or not enough of its memory.
    """
    device = device_of(options.device)
    called = options.shape or ("melt-1.6b" if device.type == "cuda" else "small")
    sizes = {**shape(called), "total_ut_steps": max(options.loops)}
    torch.manual_seed(0)
    rows = []
    try:
        with torch.device(device):
            model = Student(MeltConfig(**sizes)).to(torch.bfloat16).eval()
            prompt = torch.randint(model.config.vocab_size, (options.batch, options.prompt))
        generate(model, prompt, loops=2, tokens=2)  # compile and allocate
        depths = sorted(set(options.loops))
        for loops in tqdm(depths, unit="depth", disable=None):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            served = [generate(model, prompt, loops, options.generated) for _ in range(options.rounds)]
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            rates = [options.batch * options.generated / seconds for seconds, _ in served]
            rows.append(Row(name_of(device), called, loops, rates, served[-1][1], peak))
    except torch.OutOfMemoryError as error:
        raise BenchError(f"{error}; lower --batch, --prompt or --generated") from None
    return rows


@torch.inference_mode()
def generate(model: Student, prompt: torch.Tensor, loops: int, tokens: int) -> tuple[float, int]:
    """Seconds for so many tokens of each sequence, and the bytes of the rows in the end."""
    cache = MeltRows(model.config, len(prompt), prompt.device)
    begun = time.perf_counter()
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


def table(rows: Sequence[Row]) -> str:
    """The rows in columns; MB are 10^6 bytes."""
    lines: list[tuple[str, ...]] = [("T", "tok/s", "min", "max", "K and V rows", "peak memory")]
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f} MB"
        rate = (f"{row.tokens_per_second:.1f}", f"{min(row.rates):.1f}", f"{max(row.rates):.1f}")
        lines.append((str(row.loops), *rate, f"{row.row_bytes:,} B", peak))
    same = len({row.row_bytes for row in rows}) == 1
    text = f"{rows[0].device}, shape {rows[0].shape}, bfloat16, token mode\n\n{columns(lines)}"
    return f"{text}\n\nrows the same at every depth: {'reached' if same else 'missed'}" if len(rows) > 1 else text


def facts(rows: Sequence[Row]) -> dict[str, object]:
    """The same for machines."""
    return {"rows": [{**asdict(row), "tokens_per_second": row.tokens_per_second} for row in rows]}


def figure(rows: Sequence[Row]) -> "Figure":
    """Throughput and memory over the loops."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4), layout="constrained")
    rate, held = drawn.subplots(1, 2)
    loops = [row.loops for row in rows]
    for axes, title in ((rate, "generated tokens a second"), (held, "memory, MB")):
        axes.set(title=title, xlabel="loops T")
        axes.set_xscale("log", base=2)
        axes.set_xticks(loops, [str(each) for each in loops])
        axes.grid(alpha=0.3)
    rate.plot(loops, [row.tokens_per_second for row in rows], marker="o")
    held.plot(loops, [row.row_bytes / 1e6 for row in rows], marker="o", label="K and V rows")
    if rows[0].peak_bytes is not None:
        held.plot(loops, [(row.peak_bytes or 0) / 1e6 for row in rows], marker="s", label="peak, weights included")
    for axes in (rate, held):
        axes.set_ylim(bottom=0)
    held.legend()
    drawn.suptitle(f"{rows[0].device}, shape {rows[0].shape}")
    return drawn
