"""For `melt-serve bench kernels`: MELT's arithmetic where it is used, in a decoding layer and in a training step."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from melt_serve.config import LoopLMConfig, MeltConfig
from melt_serve.device import seconds
from melt_serve.kernels.rows import RowWrite, write_rows
from melt_serve.modeling import OuroForCausalLM
from melt_serve.modeling.looplm import DecoderLayer, SelfAttention, rotary_tables
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.losses import distillation_from_states
from melt_serve.train.distil.student import FusedAttention, Student
from melt_serve.train.distil.teacher import ask_teacher

BETA = 0.1
"""The weight of the attention outputs' distance in phase 2 (arXiv 2605.07721)."""

BLOCK = 16
"""Tokens in a block of the cache that a layer decodes over."""


def measure_layers(
    config: MeltConfig, batch: int, context: int, rounds: int, device: torch.device, progress: tqdm
) -> dict[str, list[float]]:
    """Time a token of every sequence through all loops of one layer, a MELT's and a LoopLM's, in turn.

    Args:
        batch: sequences.
        context: tokens of each, with the one that is decoded.

    Returns:
        Seconds of each round, by model.
    """
    attentions = {"melt": FusedAttention(config), "looplm": SelfAttention(config)}
    runs = {}
    for name, attention in attentions.items():
        layer = DecoderLayer(config, attention).to(device, torch.bfloat16).requires_grad_(False)
        runs[name] = decoding(layer, config, batch, context, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(runs[name], device))
        progress.update()
    return times


def decoding(
    layer: DecoderLayer, config: MeltConfig, batch: int, context: int, device: torch.device
) -> Callable[[], Tensor]:
    """Return all loops of one layer for a token of every sequence, over a paged cache; a LoopLM has one a loop."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    attention, dim = layer.self_attn, config.head_dim
    is_melt = isinstance(attention, FusedAttention)
    blocks = -(-context // BLOCK)
    x = torch.randn(batch, config.hidden_size, dtype=torch.bfloat16, device=device)
    size = (batch * blocks, BLOCK, config.num_key_value_heads, 2 * dim)
    caches = [
        torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(1 if is_melt else config.total_ut_steps)
    ]
    slots = torch.arange(batch, device=device) * blocks * BLOCK + context - 1
    positions = torch.full((batch,), context - 1, device=device)
    table = rotary_table(config, context, device)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, dim))

    @torch.no_grad()
    def run() -> Tensor:
        state, h = x, None
        for loop in range(1, config.total_ut_steps + 1):
            n = layer.input_layernorm(state)
            if is_melt:
                h = attention.kv_gate(n, h, loop)
            source = h if is_melt else n
            cache = caches[0 if is_melt else loop - 1]
            q, k, v = heads(attention.q_proj(n)), heads(attention.k_proj(source)), heads(attention.v_proj(source))
            k_cache, v_cache = cache.split(dim, dim=-1)
            write_rows(RowWrite(q, k, v, positions, table, k_cache, v_cache, slots))
            own = cache.view(batch, -1, *cache.shape[2:])[:, :context].transpose(1, 2)
            keys, values = own.split(dim, dim=-1)
            attended = F.scaled_dot_product_attention(
                q[:, :, None], keys, values, enable_gqa=keys.shape[1] != q.shape[1]
            )
            state = layer.finish(state, attention.o_proj(attended.flatten(1)))
        return state

    return run


def rotary_table(config: LoopLMConfig, positions: int, device: torch.device) -> Tensor:
    """Return cosines and sines of RoPE as the rows' kernel reads them: [positions, head_dim]."""
    tables = rotary_tables(config, torch.arange(positions, device=device)[None], torch.bfloat16)
    return torch.cat([each[0, 0].chunk(2, dim=-1)[0] for each in tables], dim=-1)


def measure_training(
    config: MeltConfig, sizes: dict[str, object], tokens: int, rounds: int, device: torch.device
) -> tuple[float, int]:
    """Measure a phase-2 step without the optimizer's: the median seconds, and operations in matmuls and attention.

    Args:
        config: the student's.
        sizes: the teacher's.
        tokens: of the step.
    """
    with torch.device(device):
        teacher = OuroForCausalLM(LoopLMConfig(**sizes)).to(torch.bfloat16).requires_grad_(False)
        student = Student(config).to(torch.bfloat16)
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    batch = Batch(ids, torch.ones_like(ids), ids, torch.tensor([0], device=device), ids)

    def step() -> None:
        student.zero_grad()
        loops = config.total_ut_steps
        wanted = ask_teacher(teacher, batch, batch.real, loops, attention=True)
        given = student.run_batch(batch, batch.real, loops, teacher_attention=wanted.attention)
        assert given.distance is not None
        aligned = given.distance / (loops * config.num_hidden_layers * ids.numel())
        answered = distillation_from_states(wanted.states, wanted.head, given.states, given.head)
        (answered + BETA * aligned).backward()

    with FlopCounterMode(display=False) as counter:  # and warm up
        step()
    times = []
    for _ in range(rounds):
        synchronize(device)
        begun = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return median(times), counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()
