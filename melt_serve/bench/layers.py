"""For `melt-serve bench kernels`: MELT's arithmetic where it is used, in a decoding layer and in a training step."""

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from melt_serve.config import LoopLMConfig, MeltConfig
from melt_serve.device import seconds
from melt_serve.kernels.gate import gate_blend
from melt_serve.kernels.rows import RowWrite, write_rows
from melt_serve.modeling import OuroForCausalLM
from melt_serve.modeling.looplm import DecoderLayer, SelfAttention
from melt_serve.modeling.melt import MeltAttention
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.losses import distillation_from_states
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import ask_teacher

if TYPE_CHECKING:
    from melt_serve.bench.kernels import Options

BETA = 0.1
"""The weight of the attention outputs' distance in phase 2 (arXiv 2605.07721)."""

BLOCK = 16
"""Tokens in a block of the cache that a layer decodes over."""


def measure_layers(
    config: MeltConfig, options: "Options", device: torch.device, progress: tqdm
) -> dict[str, list[float]]:
    """One token of every sequence through all loops of one layer, as a MELT's and as a LoopLM's, in turn."""
    layers = {
        "melt": DecoderLayer(config, MeltAttention(config)),
        "looplm": DecoderLayer(config, SelfAttention(config)),
    }
    runs = {}
    for name, layer in layers.items():
        layer.to(device, torch.bfloat16).requires_grad_(False)
        runs[name] = decoding(layer, config, options, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(runs[name], device))
        progress.update()
    return times


def decoding(layer: DecoderLayer, config: MeltConfig, options: "Options", device: torch.device) -> Callable[[], Tensor]:
    """All loops of one layer for one token of every sequence, over a paged cache; a LoopLM has one for each loop."""
    assert config.num_key_value_heads is not None and config.head_dim is not None and options.context is not None
    attention, dim, eps = layer.self_attn, config.head_dim, config.rms_norm_eps
    is_melt = isinstance(attention, MeltAttention)
    blocks = -(-options.context // BLOCK)
    x = torch.randn(options.batch, config.hidden_size, dtype=torch.bfloat16, device=device)
    size = (options.batch * blocks, BLOCK, config.num_key_value_heads, 2 * dim)
    caches = [
        torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(1 if is_melt else config.total_ut_steps)
    ]
    slots = torch.arange(options.batch, device=device) * blocks * BLOCK + options.context - 1
    positions = torch.full((options.batch,), options.context - 1, device=device)
    table = rotary_table(dim, options.context, device)

    def norm(x: Tensor, which: torch.nn.Module) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], which.weight, eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, dim))

    @torch.no_grad()
    def run() -> Tensor:
        state, h = x, None
        for loop in range(config.total_ut_steps):
            n = norm(state, layer.input_layernorm)
            if is_melt:
                h = n if h is None else blended(attention, n, h)
            source = h if is_melt else n
            cache = caches[0 if is_melt else loop]
            q, k, v = heads(attention.q_proj(n)), heads(attention.k_proj(source)), heads(attention.v_proj(source))
            k_cache, v_cache = cache.split(dim, dim=-1)
            write_rows(RowWrite(q, k, v, positions, table, k_cache, v_cache, slots))
            own = cache.view(options.batch, -1, *cache.shape[2:])[:, : options.context].transpose(1, 2)
            keys, values = own.split(dim, dim=-1)
            attended = F.scaled_dot_product_attention(
                q[:, :, None], keys, values, enable_gqa=keys.shape[1] != q.shape[1]
            )
            state = state + norm(attention.o_proj(attended.flatten(1)), layer.input_layernorm_2)
            inner, mlp = norm(state, layer.post_attention_layernorm), layer.mlp
            inner = mlp.down_proj(F.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))
            state = state + norm(inner, layer.post_attention_layernorm_2)
        return state

    return run


def rotary_table(head_dim: int, positions: int, device: torch.device) -> Tensor:
    """Cosines and sines of RoPE, [positions, head_dim]."""
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.arange(positions, device=device)[:, None] / LoopLMConfig.default_theta**exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).bfloat16()


def blended(attention: MeltAttention, n: Tensor, h: Tensor) -> Tensor:
    """The gate with its matmuls."""
    own = attention.kv_gate
    return gate_blend(F.linear(n, own.input_proj.weight), own.state_proj(h), own.input_proj.bias, h, n)


def measure_training(
    config: MeltConfig, sizes: dict[str, object], options: "Options", device: torch.device
) -> tuple[float, int]:
    """The median time of a phase-2 step, without the optimizer's, and its operations in matmuls and attention.

    Args:
        config: the student's.
        sizes: the teacher's.
    """
    assert options.train_tokens is not None
    with torch.device(device):
        teacher = OuroForCausalLM(LoopLMConfig(**sizes)).to(torch.bfloat16).requires_grad_(False)
        student = Student(config).to(torch.bfloat16)
    ids = torch.randint(config.vocab_size, (1, options.train_tokens), device=device)
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
    for _ in range(options.rounds):
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
