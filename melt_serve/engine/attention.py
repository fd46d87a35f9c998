"""Which rows a loop reads and writes: one attention layer over vLLM's paged cache, whose tables change with the loop.

All loops of a layer call the same attention layer. Its metadata changes between them: fewer tokens run, as requests
finish their loops, and in `chunk` mode other rows are meant. There, a loop before a request's last sees the final
rows of closed chunks and its own loop's rows of the open chunk: two block tables laid over each other.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
    is_quantized_kv_cache,
)
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from melt_serve.config import MeltConfig
from melt_serve.engine.cache import FinalRowsSpec, OpenRowsSpec
from melt_serve.engine.depth import Depth
from melt_serve.kernels.rows import write_rows
from melt_serve.kernels.switch import chosen, takes_triton

FUSED_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
"""vLLM's backends whose attention reads K and V from the cache alone, laid out so that `write_rows` can write them."""

FUSED_ROWS = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3")
"""`--kv-cache-dtype` of rows that `write_rows` can make."""


@dataclass(frozen=True)
class StepRecord:
    """What vLLM says of a step's requests and of their blocks of one kind, and what makes a kernel's metadata of it."""

    builder: Any
    common: CommonAttentionMetadata


class FinalRows(Attention):
    """A layer's attention, and the rows that stay of every token: those of its last loop.

    Attributes:
        fused: one kernel of ours rotates queries and keys and writes the rows; otherwise two of vLLM's do.
    """

    attn_backend: Any  # a class of vLLM's, AttentionBackend
    step: StepRecord

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused = fuses_rows(self)
        self.attn_backend = recording_backend(self.attn_backend, self.fused)

    def rotate_and_attend(self, positions: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        """Attention over all rows, this step's included: [tokens, heads * head_dim], as q, k and v, which have no RoPE.

        Args:
            positions: [tokens].
            rotary: vLLM's module for RoPE on whole heads.
        """
        if self.fused:
            name = _encode_layer_name(self.layer_name)
            torch.ops.vllm.melt_rotate_and_write(q, k, v, positions, rotary.cos_sin_cache, name)
        else:
            q, k = rotary(positions, q, k)
        return self(q, k, v)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One row a token."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        config: MeltConfig = vllm_config.model_config.hf_config
        return FinalRowsSpec(**vars(spec), chunk_size=config.chunk_size, decode_mode=config.decode_mode)


class OpenRows(Attention):
    """Room for the open chunk's rows of one loop, `chunk` mode only.

    Nobody calls it. Its blocks lie in the memory of the layer's final rows, through which both are read and written.
    """

    attn_backend: Any
    step: StepRecord

    def __init__(self, *args: Any, loop: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn_backend = recording_backend(self.attn_backend)
        self.loop = loop

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One row a token of the open chunk."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        shared = {name: value for name, value in vars(spec).items() if name in OpenRowsSpec.__dataclass_fields__}
        return OpenRowsSpec(**shared, chunk_size=vllm_config.model_config.hf_config.chunk_size, loop=self.loop)


def fuses_rows(layer: Attention) -> bool:
    """Whether `write_rows` stands for vLLM's RoPE and write of rows: on a GPU, where `MELT_KERNELS=triton` asks for it.

    Not by itself: how one kernel launched from Python compares with two of vLLM's is not yet measured.

    Raises:
        KernelError: asked for, and this layer's rows cannot be written so.
    """
    if not current_platform.is_cuda() or chosen() != "triton":
        return False
    backend = layer.attn_backend.get_name()
    if backend not in FUSED_BACKENDS:
        refusal = f"vLLM's attention backend is {backend}, not one of {', '.join(FUSED_BACKENDS)}"
    elif layer.kv_cache_dtype not in FUSED_ROWS:
        refusal = f"--kv-cache-dtype is {layer.kv_cache_dtype}, not one of {', '.join(FUSED_ROWS)}"
    else:
        refusal = None
    return takes_triton("write_rows", torch.device("cuda"), lambda: refusal)


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, layer_name: LayerNameType
) -> None:
    """Rotate q in place and write the rows of rotated k, and of v, into a layer's slots of this step.

    As an operator it hides the cache from `torch.compile`; that q changes keeps it before the attention.
    """
    _, layer, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    if slots is None:  # vLLM warms up
        return
    q, k, v = (each.unflatten(-1, (-1, layer.head_size)) for each in (q, k, v))
    k_cache, v_cache = kv_cache.transpose(1, 2).split(layer.head_size, dim=-1)
    scales = (layer._k_scale, layer._v_scale) if is_quantized_kv_cache(layer.kv_cache_dtype) else (None, None)
    write_rows(q, k, v, positions, table, k_cache, v_cache, slots, *scales)


direct_register_custom_op(
    "melt_rotate_and_write", rotate_and_write, mutates_args=["q"], fake_impl=lambda *arguments: None
)


@functools.cache
def recording_backend(backend: type[AttentionBackend], writes_rows: bool = False) -> type[AttentionBackend]:
    """A backend that also leaves a step's record with the first layer of its cache group.

    Args:
        writes_rows: vLLM need not write the rows: `rotate_and_write` has.
    """

    class RecordingBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False  # else vLLM would not show the tables of all groups

        def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, *args: Any):
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args)
            self.layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]

        def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, **kwargs: Any) -> Any:
            self.layer.step = StepRecord(self, common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, **kwargs)

        def build_part(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
            """Metadata for a part of the step that was recorded."""
            return super().build(0, common_attn_metadata)

    recording = subclass_attention_backend("Recording", backend, RecordingBuilder)
    if writes_rows:
        recording.forward_includes_kv_cache_update = True
    return recording


@dataclass(frozen=True)
class Tables:
    """Where a loop's rows are: blocks [R, blocks] of each request, and slots [S] that the step's tokens write."""

    blocks: Tensor
    slots: Tensor


class StepRows:
    """A step's tokens and their tables, from loop to loop.

    Attributes:
        deepest: the loops of the request that may run most.
        tokens: [A], those that still run, as places among the step's own S.
        requests: [A], each one's request, as a row of the step's R.
        positions: [A], in its own sequence.
    """

    def __init__(
        self, final: Sequence[FinalRows], open_rows: Sequence[OpenRows], positions: Tensor, depths: Sequence[Depth]
    ):
        """At the beginning of a step, when all tokens run.

        Args:
            final: the final rows of all layers.
            open_rows: one layer's open rows, of loop 1, 2, ...
            positions: [S].
            depths: R.
        """
        record = final[0].step
        self.names = [layer.layer_name for layer in final]
        self.builder, self.common = record.builder, record.common
        self.deepest = max(depth.loops for depth in depths)
        self.tokens = torch.arange(len(positions), device=positions.device)
        ends = self.common.query_start_loc[1 : len(depths) + 1]
        self.requests = torch.searchsorted(ends, self.tokens.to(ends.dtype), right=True).clamp(max=len(depths) - 1)
        self.positions = positions
        self.metadata = get_forward_context().attn_metadata[self.names[0]]
        self.runs: Tensor | None = None
        self.final = Tables(self.common.block_table_tensor, self.common.slot_mapping)
        self.open = [self._laid_over(layer) for layer in open_rows[: self.deepest - 1]]

    def tables(self, loop: int) -> Tables:
        """Where the rows of this loop are."""
        return self.open[loop - 1] if loop <= len(self.open) else self.final

    @contextmanager
    def at(self, loop: int) -> Iterator[None]:
        """What attention layers called inside see: this loop's tables, and the tokens that still run."""
        if self.runs is None and not self.open:
            yield  # as vLLM has set it up
            return
        tables = self.tables(loop)
        metadata = copy.copy(self.metadata)
        metadata.block_table = tables.blocks if self.runs is None else tables.blocks[self.runs]
        metadata.slot_mapping = tables.slots if self.runs is None else tables.slots[self.tokens]
        context = get_forward_context()
        changed = replace(
            context,
            attn_metadata={**context.attn_metadata, **dict.fromkeys(self.names, metadata)},
            slot_mapping={**context.slot_mapping, **dict.fromkeys(self.names, metadata.slot_mapping)},
        )
        with override_forward_context(changed):
            yield

    def keep(self, staying: Tensor) -> None:
        """Go on with these tokens only: [A], true for each that runs another loop, at least one.

        Tokens of one request that stand next to each other are one sequence to the kernel. Where one between
        them has left, they are two, over the same blocks: each ends at its own last token, so attention is causal.
        """
        self.tokens, self.requests = self.tokens[staying], self.requests[staying]
        self.positions = self.positions[staying]
        begins = torch.ones_like(self.tokens, dtype=torch.bool)
        begins[1:] = (self.requests.diff() != 0) | (self.positions.diff() != 1)
        starts = begins.nonzero().squeeze(1)
        bounds = torch.cat((starts, starts.new_tensor([len(self.tokens)]))).to(self.common.query_start_loc.dtype)
        ends = self.positions[bounds[1:].long() - 1] + 1
        self.runs = self.requests[starts]
        bounds_cpu, ends_cpu = bounds.cpu(), ends.to(self.common.seq_lens.dtype).cpu()
        self.metadata = self.builder.build_part(
            CommonAttentionMetadata(
                query_start_loc=bounds,
                query_start_loc_cpu=bounds_cpu,
                seq_lens=ends.to(self.common.seq_lens.dtype),
                seq_lens_cpu_upper_bound=ends_cpu,
                num_reqs=len(starts),
                num_actual_tokens=len(self.tokens),
                max_query_len=int(bounds_cpu.diff().max()),
                max_seq_len=int(ends_cpu.max()),
                block_table_tensor=self.final.blocks[self.runs],
                slot_mapping=self.final.slots[self.tokens],
                causal=True,
                positions=self.positions,
            )
        )

    def slots_after(self, loop: int, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Where else the rows of tokens that leave after this loop belong: to the loops they do not run.

        Args:
            leaving: [A], true for those tokens.

        Returns:
            slots: [W], and rows: [W], whose row of this loop goes there, as places among the tokens that leave.
        """
        tokens = self.tokens[leaving]
        written = self.tables(loop).slots[tokens]
        later = torch.stack([self.tables(other).slots[tokens] for other in range(loop + 1, self.deepest + 1)])
        missing = later != written
        return later[missing], missing.nonzero()[:, 1]

    def _laid_over(self, rows: OpenRows) -> Tables:
        own, spec = rows.step.common, rows.step.builder.kv_cache_spec
        null_slots = spec.block_size
        blocks = lay_over(
            own.block_table_tensor, self.final.blocks, own.seq_lens, spec.chunk_size, spec.block_size, null_slots
        )
        return Tables(blocks, torch.where(own.slot_mapping < null_slots, self.final.slots, own.slot_mapping))


def lay_over(own: Tensor, final: Tensor, seq_lens: Tensor, chunk_size: int, block_size: int, null_slots: int) -> Tensor:
    """The block table of a loop before the last: final blocks, but the open chunk's own where it has them.

    Args:
        own: [R, blocks], blocks of this loop; the null block where there is none, as in requests that never
            come here or whose last loop this is; anything in closed chunks.
        final: [R, blocks], blocks of final rows.
        seq_lens: [R], tokens of each request up to the end of this step, which lies in the open chunk.
        chunk_size: C, a multiple of `block_size`, the tokens in one entry of the tables.
        null_slots: slots below this are in the null block.
    """
    open_block = (seq_lens - 1) // chunk_size * (chunk_size // block_size)
    columns = torch.arange(own.shape[1], device=own.device)
    kept = (columns >= open_block[:, None]) & (own * block_size >= null_slots)
    return torch.where(kept, own, final)
