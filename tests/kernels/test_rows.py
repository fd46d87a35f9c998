"""RoPE with the write of rows equals the two steps written out, in every layout of the cache."""

import math

import pytest
import torch

from melt_serve.config import LoopLMConfig
from melt_serve.kernels.dispatch import KernelError, chosen
from melt_serve.kernels.rows import RowWrite, write_rows
from melt_serve.modeling.looplm import rotary_tables, rotate
from tests.kernels.device import DEVICE

BLOCKS, PLACES, LONGEST = 5, 4, 50
FP8 = torch.float8_e4m3fn
K_SCALE, V_SCALE = 0.25, 0.125
FAR = -7.0
"""What a cache holds before; no row has it."""

# Dtypes of rows and cache, and the relative error that one rounding of each may make. Triton's interpreter rounds to
# bfloat16 downwards, and to FP8 wrongly where that changes the exponent: FP8 rows are made of numbers it can hold.
DTYPES = {
    "float32": (torch.float32, torch.float32, 1e-6),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 2**-7),
    "float16": (torch.float16, torch.float16, 2**-10),
    "fp8": (torch.bfloat16, FP8, 0),
    "fp8 as uint8": (torch.bfloat16, torch.uint8, 0),
    "fp8 of float32": (torch.float32, FP8, 0),
}


class Case:
    """Queries and rows as parts of one matmul's output, and a cache of K and V side by side, as vLLM has it."""

    def __init__(self, dtype, cache_dtype, heads=4, kv_heads=2, head_dim=16, tokens=6, layout="NHD", size=1.0):
        generator = torch.Generator().manual_seed(0)
        self.head_dim = head_dim
        together = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator) * size
        angles = torch.arange(LONGEST)[:, None] * 10_000 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
        if cache_dtype in (FP8, torch.uint8):  # 3 bits, and quarters of a turn
            together = together.to(FP8).float() * K_SCALE
            angles = angles.round() * math.pi / 2
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        self.table = (cos_sin.round() if cache_dtype in (FP8, torch.uint8) else cos_sin).to(DEVICE, dtype)
        together = together.to(DEVICE, dtype)
        parts = together.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
        self.q, self.k, self.v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        self.positions = torch.randint(LONGEST, (tokens,), generator=generator).to(DEVICE)
        shape = (BLOCKS, PLACES, kv_heads) if layout == "NHD" else (BLOCKS, kv_heads, PLACES)
        self.memory = torch.full((*shape, 2 * head_dim), FAR).to(FP8 if cache_dtype == torch.uint8 else cache_dtype)
        self.memory = self.memory.to(DEVICE)
        rows = self.memory if layout == "NHD" else self.memory.transpose(1, 2)
        self.k_rows, self.v_rows = rows.split(head_dim, dim=-1)
        as_passed = self.memory.view(torch.uint8) if cache_dtype == torch.uint8 else self.memory
        as_passed = as_passed if layout == "NHD" else as_passed.transpose(1, 2)
        self.k_cache, self.v_cache = as_passed.split(head_dim, dim=-1)
        self.scales = {}
        if cache_dtype in (FP8, torch.uint8):
            self.scales = {"k_scale": torch.tensor(K_SCALE).to(DEVICE), "v_scale": torch.tensor([V_SCALE]).to(DEVICE)}

    def into(self, slots):
        tensors = (self.q, self.k, self.v, self.positions, self.table, self.k_cache, self.v_cache, slots)
        return RowWrite(*tensors, **self.scales)

    def write(self, slots):
        write_rows(self.into(torch.tensor(slots, dtype=torch.int64, device=DEVICE)))

    def rotated(self, x):
        """Apply RoPE pair by pair, in float64."""
        half = self.head_dim // 2
        out = x.double().clone()
        for token, position in enumerate(self.positions.tolist()):
            for pair in range(half):
                cos, sin = self.table[position, [pair, half + pair]].double().tolist()
                first, second = x[token, :, pair].double(), x[token, :, half + pair].double()
                out[token, :, pair] = first * cos - second * sin
                out[token, :, half + pair] = second * cos + first * sin
        return out

    def holds(self, slots, k, v, tolerance):
        """Assert that the cache has these rows in these slots, and what it had before everywhere else."""
        k_scale, v_scale = (K_SCALE, V_SCALE) if self.scales else (1.0, 1.0)
        filled = {slot: token for token, slot in enumerate(slots) if slot >= 0}
        for cache, rows, scale in ((self.k_rows, k, k_scale), (self.v_rows, v, v_scale)):
            for slot in range(BLOCKS * PLACES):
                there = cache[slot // PLACES, slot % PLACES].double()
                if slot not in filled:
                    assert (there == FAR).all()
                    continue
                expected = rows[filled[slot]].double() / scale
                if self.scales:
                    expected = expected.clamp(-448, 448)
                torch.testing.assert_close(there, expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_keys_are_rotated_and_rows_are_in_their_slots_and_nowhere_else(dtypes, layout):
    dtype, cache_dtype, tolerance = DTYPES[dtypes]
    case = Case(dtype, cache_dtype, layout=layout)
    q, k, v, untouched = case.rotated(case.q), case.rotated(case.k), case.v.clone(), case.k.clone()
    slots = [17, -1, 3, 0, -1, 19]
    case.write(slots)
    torch.testing.assert_close(case.q.double(), q, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-2)
    case.holds(slots, k, v, tolerance)
    assert torch.equal(case.v, v) and torch.equal(case.k, untouched)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 2), (3, 1, 80), (16, 16, 6), (5, 5, 256), (40, 8, 64)]
)
def test_heads_of_every_size_and_number(heads, kv_heads, head_dim):
    case = Case(torch.float32, torch.float32, heads, kv_heads, head_dim, tokens=2)
    q, k, v = case.rotated(case.q), case.rotated(case.k), case.v.clone()
    case.write([5, 6])
    torch.testing.assert_close(case.q.double(), q, rtol=1e-5, atol=1e-5)
    case.holds([5, 6], k, v, 1e-5)


@pytest.mark.parametrize("slots", [[], [-1], [9], [7, 8, 9, 10]])
def test_tokens_without_a_slot_are_rotated_but_not_written(slots):
    """vLLM pads a step's tokens, but not its slots."""
    case = Case(torch.float32, torch.float32, tokens=4)
    q, k, v = case.rotated(case.q), case.rotated(case.k), case.v.clone()
    case.write(slots)
    torch.testing.assert_close(case.q.double(), q, rtol=1e-5, atol=1e-5)
    case.holds(slots, k, v, 1e-5)


def test_no_tokens_are_no_error():
    case = Case(torch.float32, torch.float32, tokens=0)
    case.write([])
    assert (case.memory == FAR).all()


def test_what_fp8_cannot_hold_is_its_largest_number():
    case = Case(torch.float32, FP8, size=1e4)
    k, v = case.rotated(case.k), case.v.clone()
    case.write([0, 1, 2, 3, 4, 5])
    case.holds([0, 1, 2, 3, 4, 5], k, v, 0)
    assert case.memory.float().abs().max() == 448


def test_it_is_the_reference_models_rotation():
    config = LoopLMConfig(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_theta": 10_000.0})
    case = Case(torch.float32, torch.float32)
    tables = rotary_tables(config, case.positions[None].cpu(), torch.float32)
    expected = rotate(case.q.cpu().transpose(0, 1)[None], tables)[0].transpose(0, 1)
    case.write([-1])
    torch.testing.assert_close(case.q.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtypes", ["float32", "fp8"])
def test_columns_that_are_not_neighbours_go_to_the_reference_or_are_refused(dtypes):
    dtype, cache_dtype, tolerance = DTYPES[dtypes]
    case = Case(dtype, cache_dtype)
    case.k = torch.stack((case.k, case.k), dim=-1)[..., 0]
    if chosen() == "triton":
        with pytest.raises(KernelError, match="not contiguous"):
            case.write([1])
    else:
        k, v = case.rotated(case.k), case.v
        case.write([1])
        case.holds([1], k, v, tolerance)


def test_what_cannot_be_written_is_refused():
    def refused(says, dtype=torch.float32, cache_dtype=torch.float32, slots=(1,), **changes):
        case = Case(dtype, cache_dtype)
        vars(case).update({name: change(case) for name, change in changes.items()})
        with pytest.raises(ValueError, match=says):
            case.write(list(slots))

    refused("float32 do not go to a cache of torch.bfloat16", cache_dtype=torch.bfloat16)
    refused("FP8 rows take one scale", cache_dtype=FP8, scales=lambda case: {})
    refused("FP8 rows take one scale", scales=lambda case: {"k_scale": torch.ones(1), "v_scale": torch.ones(1)})
    per_head = {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}
    refused("FP8 rows take one scale", cache_dtype=FP8, scales=lambda case: per_head)
    refused("7 slots do not fit", slots=range(7))
    refused("table 8 as wide", table=lambda case: case.table[:, :8])
    refused("do not fit", v=lambda case: case.v[:, :1])
