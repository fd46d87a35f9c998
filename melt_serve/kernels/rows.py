"""RoPE, and the write of K and V rows into a paged cache, in one pass: a rotated key is never written anywhere else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from melt_serve.kernels.dispatch import jit, takes_triton, tl, triton

ROWS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
"""Dtypes of the cache: that of k and v, or FP8."""

FP8_MOST = torch.finfo(torch.float8_e4m3fn).max
PAIRS_A_PROGRAM = 1024


class RowWrite(NamedTuple):
    """The tensors of one write.

    Attributes:
        q: [tokens, heads, head_dim], overwritten.
        k, v: [tokens, KV heads, head_dim], of the same dtype.
        positions: [tokens], each in its own sequence.
        table: [positions, head_dim], cosines in the first half, sines in the second.
        k_cache, v_cache: [blocks, tokens of a block, KV heads, head_dim], in any layout; of k's dtype, or
            float8_e4m3fn (also as uint8).
        slots: [written], block * tokens of a block + place, for the first tokens; no slot twice; -1 for no row.
        k_scale, v_scale: one float32 each, of FP8 rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    table: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def write_rows(write: RowWrite) -> None:
    """Rotate q in place, and write rotated k, and v, to their slots.

    RoPE pairs the first half of a head with the second; it is computed in float32 and rounded to the dtype of k, and an
    FP8 row is that divided by its scale, at most 448. Heads may have any even size, and all but the last dimension any
    stride; where that is not contiguous, the reference runs, visibly (`takes_triton`). The Triton version waits for
    nothing, and its launch depends on shapes alone; the reference waits for the device, to drop slots of -1.

    Raises:
        ValueError: tensors that neither version takes; the message names the rule.
        KernelError: `MELT_KERNELS=triton` for tensors that only the reference takes.
    """
    if write.k_cache.dtype == torch.uint8:
        k_cache, v_cache = (cache.view(torch.float8_e4m3fn) for cache in (write.k_cache, write.v_cache))
        write = write._replace(k_cache=k_cache, v_cache=v_cache)
    refuse(write)
    if takes_triton("write_rows", write.q.device, lambda: refusal(write)):
        launch(write)
    else:
        reference(write)


def reference(write: RowWrite) -> None:
    """Rotate and write in plain PyTorch."""
    q, k, v, positions, table, k_cache, v_cache, slots, k_scale, v_scale = write
    cos, sin = table[positions].float()[:, None].chunk(2, dim=-1)
    q.copy_(rotate(q, cos, sin))
    written = (slots >= 0).nonzero().squeeze(1)
    block, place = slots[written] // k_cache.shape[1], slots[written] % k_cache.shape[1]
    put(k_cache, block, place, rotate(k, cos, sin)[written], k_scale)
    put(v_cache, block, place, v[written], v_scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [tokens, heads, head_dim]; cos and sin are [tokens, 1, head_dim / 2], float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def put(cache: Tensor, block: Tensor, place: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Write rows, [written, KV heads, head_dim], to their places in the cache."""
    if scale is not None:
        rows = (rows.float() / scale).clamp(-FP8_MOST, FP8_MOST).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)  # PyTorch has no indexed write of FP8
    cache[block, place] = rows


def refuse(write: RowWrite) -> None:
    """Refuse tensors that neither version takes.

    Raises:
        ValueError: as `write_rows`.
    """
    q, k, v, _, table, k_cache, v_cache, slots, *scales = write
    head_dim = q.shape[-1]
    if head_dim % 2 or table.shape[-1] != head_dim:
        raise ValueError(f"write_rows: head_dim={head_dim} must be even, and RoPE's table {table.shape[-1]} as wide")
    if k.shape != v.shape or k_cache.shape != v_cache.shape or k_cache.shape[2:] != k.shape[1:]:
        shapes = [tuple(each.shape) for each in (k, v, k_cache, v_cache)]
        raise ValueError(f"write_rows: k, v and their caches are of the shapes {shapes}, which do not fit")
    if len(k) != len(q) or len(slots) > len(k):
        raise ValueError(f"write_rows: {len(q)} queries, {len(k)} keys and {len(slots)} slots do not fit")
    if not q.dtype == k.dtype == v.dtype or k_cache.dtype != v_cache.dtype or k_cache.dtype not in (k.dtype, ROWS[-1]):
        raise ValueError(f"write_rows: rows of {k.dtype} do not go to a cache of {k_cache.dtype}")
    for scale in scales:
        if (scale is None) == (k_cache.dtype == ROWS[-1]) or (scale is not None and scale.numel() != 1):
            raise ValueError("write_rows: FP8 rows take one scale for K and one for V, other rows none")


def refusal(write: RowWrite) -> str | None:
    """Return why the Triton version does not take tensors that the reference does; None if it takes them."""
    if write.k_cache.dtype not in ROWS:
        return f"its rows are {write.k_cache.dtype}"
    indexed = (write.q, write.k, write.v, write.table, write.k_cache, write.v_cache)
    if any(each.stride(-1) != 1 for each in indexed):
        return "of its tensors, one has a last dimension that is not contiguous"
    return None


def launch(write: RowWrite) -> None:
    """Run the kernel: a program is one token and some heads, of q or of k and v."""
    q, k, v, positions, table, k_cache, v_cache, slots, _, _ = write
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    pairs = triton.next_power_of_2(head_dim // 2)
    together = max(1, PAIRS_A_PROGRAM // pairs)
    q_programs = triton.cdiv(heads, together)
    with torch.cuda.device_of(q):
        kernel[(tokens, q_programs + triton.cdiv(k.shape[1], together))](
            *write,
            len(slots),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            positions.stride(0),
            table.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            slots.stride(0),
            HEADS=heads,
            KV_HEADS=k.shape[1],
            HALF=head_dim // 2,
            PLACES=k_cache.shape[1],
            Q_PROGRAMS=q_programs,
            MOST=FP8_MOST,
            TOGETHER=together,
            PAIRS=pairs,
        )


@jit
def kernel(
    q,
    k,
    v,
    positions,
    table,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    written,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    position_stride,
    table_row,
    k_block,
    k_place,
    k_row,
    v_block,
    v_place,
    v_row,
    slot_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PLACES: tl.constexpr,
    Q_PROGRAMS: tl.constexpr,
    MOST: tl.constexpr,
    TOGETHER: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Rotate and write one token's heads: TOGETHER of q, or of k and v, as [TOGETHER, PAIRS]."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pair = tl.arange(0, PAIRS)[None, :]
    position = tl.load(positions + token * position_stride).to(tl.int64)
    cos = tl.load(table + position * table_row + pair, mask=pair < HALF, other=0).to(tl.float32)
    sin = tl.load(table + position * table_row + HALF + pair, mask=pair < HALF, other=0).to(tl.float32)
    if part < Q_PROGRAMS:
        head = part * TOGETHER + tl.arange(0, TOGETHER)[:, None]
        inside = (head < HEADS) & (pair < HALF)
        here = q + token * q_token + head * q_head + pair
        first = tl.load(here, mask=inside, other=0).to(tl.float32)
        second = tl.load(here + HALF, mask=inside, other=0).to(tl.float32)
        tl.store(here, first * cos - second * sin, mask=inside)
        tl.store(here + HALF, second * cos + first * sin, mask=inside)
    else:
        slot = tl.load(slots + token * slot_stride, mask=token < written, other=-1).to(tl.int64)
        if slot >= 0:
            head = (part - Q_PROGRAMS) * TOGETHER + tl.arange(0, TOGETHER)[:, None]
            inside = (head < KV_HEADS) & (pair < HALF)
            block, place = slot // PLACES, slot % PLACES
            here = k + token * k_token + head * k_head + pair
            first = tl.load(here, mask=inside, other=0).to(tl.float32)
            second = tl.load(here + HALF, mask=inside, other=0).to(tl.float32)
            there = k_cache + block * k_block + place * k_place + head * k_row + pair
            put_row(there, first * cos - second * sin, k, k_scale, inside, MOST)
            put_row(there + HALF, second * cos + first * sin, k, k_scale, inside, MOST)
            here = v + token * v_token + head * v_head + pair
            there = v_cache + block * v_block + place * v_place + head * v_row + pair
            put_row(there, tl.load(here, mask=inside, other=0), v, v_scale, inside, MOST)
            put_row(there + HALF, tl.load(here + HALF, mask=inside, other=0), v, v_scale, inside, MOST)


@jit
def put_row(there, values, source, scale, inside, MOST: tl.constexpr):
    """Round to the dtype of `source`, scale, and store."""
    values = values.to(source.dtype.element_ty)
    if scale is not None:
        values = values.to(tl.float32) / tl.load(scale)
        values = tl.minimum(tl.maximum(values, -MOST), MOST)
    tl.store(there, values.to(there.dtype.element_ty), mask=inside)
