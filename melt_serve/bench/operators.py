"""For `melt-serve bench kernels`: every version of a kernel timed by itself, beside the bytes it must move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from melt_serve.bench.layers import BLOCK, rotary_table
from melt_serve.config import MeltConfig
from melt_serve.device import Rates, seconds
from melt_serve.kernels import gate, rows
from melt_serve.kernels.gate import gate_blend
from melt_serve.kernels.rows import RowWrite, write_rows

VALUE_OPERATIONS = {"gate": 10, "gate and gradient": 24}
"""A value of h: sums, the sigmoid's exponential and division, the blend; and what the gradient adds to that."""


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


def gate_part(
    config: MeltConfig, tokens: int, device: torch.device, rates: Rates, goal: float | None, compiled: bool
) -> Part:
    """Time the gate: four states and a bias in, one state out."""
    *inputs, values = gate_inputs(config, tokens, device)
    with torch.no_grad():
        times = versions(device, gate.reference, gate_blend, inputs, compiled)
    return part("gate", tokens, 5 * values.nbytes + inputs[2].nbytes, values, times, rates, goal)


def gradient_part(
    config: MeltConfig, tokens: int, device: torch.device, rates: Rates, goal: float | None, compiled: bool
) -> Part:
    """Time the gate and its gradient: in the second pass five states in, three out, and a sum over tokens for b_z."""
    *inputs, values = gate_inputs(config, tokens, device)
    leaves = [each.requires_grad_() for each in inputs]

    def learn(blend: Callable[..., Tensor]) -> Callable[..., object]:
        return lambda *leaves: torch.autograd.grad(blend(*leaves), leaves, values)

    times = versions(device, gate.reference, gate_blend, leaves, compiled, learn)
    return part("gate and gradient", tokens, 14 * values.nbytes, values, times, rates, goal)


def rows_part(
    config: MeltConfig, tokens: int, device: torch.device, rates: Rates, goal: float | None, compiled: bool
) -> Part:
    """Time RoPE on queries and keys, and the rows' write: queries in and out, keys and values in, rows out."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    dim, kv_heads = config.head_dim, config.num_key_value_heads
    q = torch.randn(tokens, config.num_attention_heads, dim, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, tokens, kv_heads, dim, dtype=torch.bfloat16, device=device)
    blocks = -(-tokens // BLOCK)
    cache = torch.zeros(blocks, BLOCK, kv_heads, 2 * dim, dtype=torch.bfloat16, device=device)
    slots = torch.randperm(blocks * BLOCK, device=device)[:tokens]
    arguments = (q, k, v, torch.arange(tokens, device=device), rotary_table(config, tokens, device))
    arguments = (*arguments, *cache.split(dim, dim=-1), slots)
    with torch.no_grad():
        times = versions(device, two_steps, lambda *tensors: write_rows(RowWrite(*tensors)), arguments, compiled)
    moved = 2 * q.nbytes + 2 * (k.nbytes + v.nbytes) + arguments[4].nbytes + 2 * slots.nbytes
    operations = 3 * (q.numel() + k.numel())
    return part("RoPE and rows", tokens, moved, q, times, rates, goal, operations)


def two_steps(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """Do what the reference of `write_rows` does, for slots that are all there: it waits for nothing."""
    cos, sin = table[positions].float()[:, None].chunk(2, dim=-1)
    q.copy_(rows.rotate(q, cos, sin))
    block, place = slots // BLOCK, slots % BLOCK
    rows.put(k_cache, block, place, rows.rotate(k, cos, sin), None)
    rows.put(v_cache, block, place, v, None)


def gate_inputs(config: MeltConfig, tokens: int, device: torch.device) -> list[Tensor]:
    """Draw W_z n, U_z h, b_z, h, n; and something of the size of h for the gradient to come from."""
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
    """Measure the seconds of every version; `picked` is Triton's where there is a GPU."""
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
    """Gather the times of a kernel's versions, and its share of the copy bandwidth."""
    used = times["triton"] or times["eager"]
    assert used is not None
    operations = VALUE_OPERATIONS[name] * values.numel() if operations is None else operations
    return Part(name, tokens, moved, operations, times, moved / used / rates.copy, goal)
