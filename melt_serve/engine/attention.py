"""The attention layers over vLLM's paged cache, whose tables change with the loop.

All loops of a layer call the same attention layer. Its metadata changes between them: fewer tokens run, as requests
finish their loops, and in `chunk` mode other rows are meant. There, a loop before a request's last sees the final
rows of closed chunks and its own loop's rows of the open chunk (`tables.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, is_quantized_kv_cache

from melt_serve.config import MeltConfig
from melt_serve.engine.cache import FinalRowsSpec, OpenRowsSpec
from melt_serve.kernels.dispatch import chosen, takes_triton
from melt_serve.kernels.rows import RowWrite, write_rows

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
"""vLLM's backends whose block tables and slots are plain fields of a step's metadata."""
PROVED_ROWS = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")
"""`--kv-cache-dtype` of rows that are held against the reference."""
CUT_AT_GAPS = ("CPU_ATTN",)
"""Backends that compute query by query, so that one that stands for nobody costs as much as another.

A GPU's work on tiles of adjacent queries, and what they wait for is the rows: there a gap costs nothing, and a cut
another reading of all rows.
"""
FUSED_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
"""vLLM's backends whose attention reads K and V from the cache alone, laid out so that `write_rows` can write them."""
FUSED_ROWS = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3")
"""`--kv-cache-dtype` of rows that `write_rows` can make."""


@dataclass(frozen=True)
class StepRecord:
    """What vLLM states about a step, for one cache group.

    Attributes:
        builder: makes a kernel's metadata of `common`.
        common: the step's requests, and their block tables of the group.
    """

    builder: Any
    common: CommonAttentionMetadata


class FinalRows(Attention):
    """A layer's attention, and the rows it keeps of every token: those of its last loop.

    Attributes:
        fused: one kernel of ours rotates queries and keys and writes the rows; otherwise two of vLLM's do.
        when_loaded: is called once vLLM has brought the weights of all linear layers into their final form.
    """

    attn_backend: Any  # a class of vLLM's, AttentionBackend
    step: StepRecord
    when_loaded: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_backend(self)
        refuse_rows(self)
        self.fused = fuses_rows(self)
        self.attn_backend = recording_backend(self.attn_backend, self.fused)
        self.impl.forward = over_gaps(self.impl.forward)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Prepare as vLLM does, which comes to attention layers last, and call `when_loaded`."""
        super().process_weights_after_loading(act_dtype)
        self.when_loaded()

    def rotate_and_attend(self, positions: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        """Rotate q and k, write the rows, and return attention over all rows, this step's included.

        Args:
            positions: [tokens].
            q: [tokens, heads * head_dim], not rotated yet.
            k, v: [tokens, KV heads * head_dim], k not rotated yet.
            rotary: vLLM's module for RoPE on whole heads.

        Returns:
            [tokens, heads * head_dim].
        """
        if self.fused:
            name = _encode_layer_name(self.layer_name)
            torch.ops.vllm.melt_rotate_and_write(q, k, v, positions, rotary.cos_sin_cache, name)
        else:
            q, k = rotary(positions, q, k)
        return self(q, k, v)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the spec of one row a token."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        config: MeltConfig = vllm_config.model_config.hf_config
        return FinalRowsSpec(**vars(spec), chunk_size=config.chunk_size, decode_mode=config.decode_mode)


class OpenRows(Attention):
    """Room for the rows of loops before a request's last, while their chunk is open: `chunk` mode only.

    It is never called. Its blocks lie in the memory of the layer's final rows, through which they are read and written.
    """

    attn_backend: Any
    step: StepRecord

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn_backend = recording_backend(self.attn_backend)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the spec of a row for each loop before the last and each token of the open chunk."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        config: MeltConfig = vllm_config.model_config.hf_config
        assert config.max_loops is not None
        shared = {name: value for name, value in vars(spec).items() if name in OpenRowsSpec.__dataclass_fields__}
        return OpenRowsSpec(**shared, chunk_size=config.chunk_size, max_loops=config.max_loops)


def refuse_backend(layer: Attention) -> None:
    """Refuse an attention backend whose metadata `StepRows` cannot change from loop to loop.

    FlashInfer and FlexAttention plan their block tables before the step, so a loop would read another loop's rows.

    Raises:
        ValueError: it is none of `BACKENDS`; the message names one to choose.
    """
    backend = layer.attn_backend.get_name()
    if backend not in BACKENDS:
        raise ValueError(
            f"vLLM's attention backend {backend} cannot change block tables between loops; choose one that can: "
            f"--attention-backend {BACKENDS[0]}"
        )


def refuse_rows(layer: Attention) -> None:
    """Refuse a dtype of rows whose right answers are not shown, such as scales of each token or four bits.

    Raises:
        ValueError: it is none of `PROVED_ROWS`; the message names them.
    """
    if layer.kv_cache_dtype not in PROVED_ROWS:
        raise ValueError(
            f"--kv-cache-dtype={layer.kv_cache_dtype} is not proved for rows of loops; "
            f"choose one of {', '.join(PROVED_ROWS)}"
        )


def fuses_rows(layer: Attention) -> bool:
    """Return whether `write_rows` replaces vLLM's RoPE and write of rows: on a GPU, with `MELT_KERNELS=triton`.

    It is not the default: how one kernel launched from Python compares with two of vLLM's is not yet measured.

    Raises:
        KernelError: it was asked for, and this layer's rows cannot be written so.
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
    write_rows(RowWrite(q, k, v, positions, table, k_cache, v_cache, slots, *scales))


direct_register_custom_op(
    "melt_rotate_and_write", rotate_and_write, mutates_args=["q"], fake_impl=lambda *arguments: None
)


def over_gaps(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a backend's attention, the `forward` of its `AttentionImpl`, take fewer tokens than its metadata has queries.

    Only queries have gaps: rows are written before, for tokens that run. What is attended for a gap, whose query is 0,
    is thrown away. It happens inside of vLLM's operator, so `torch.compile` sees the tokens alone.
    """

    @functools.wraps(attend)
    def forward(
        layer: Attention,
        query: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Tensor,
        metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        queries = getattr(metadata, "queries", None)  # vLLM's own metadata has none
        if queries is None:
            return attend(layer, query, k, v, cache, metadata, output, **scales)
        spread = query.new_zeros(metadata.num_actual_tokens, *query.shape[1:])
        spread[queries] = query
        attended = output.new_empty(len(spread), *output.shape[1:])
        attend(layer, spread, k, v, cache, metadata, attended, **scales)
        return output.copy_(attended[queries])

    return forward


@functools.cache
def recording_backend(backend: type[AttentionBackend], writes_rows: bool = False) -> type[AttentionBackend]:
    """Return a backend that also leaves a step's record with the first layer of its cache group.

    Args:
        writes_rows: `rotate_and_write` writes the rows, so vLLM must not.
    """

    class RecordingBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False  # else vLLM would not show the tables of all groups
        bridges_gaps = backend.get_name() not in CUT_AT_GAPS

        def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, *args: Any):
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args)
            self.layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            # A kernel's block may be smaller than the manager's: the tables it sees then have several entries for one.
            self.entries_per_block = vllm_config.cache_config.block_size // kv_cache_spec.block_size

        def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, **kwargs: Any) -> Any:
            self.layer.step = StepRecord(self, common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, **kwargs)

        def rebuild(self, common_attn_metadata: CommonAttentionMetadata, queries: Tensor | None = None) -> Any:
            """Build metadata for some of the recorded step's tokens, and the `queries` they are: see `over_gaps`."""
            metadata = super().build(0, common_attn_metadata)
            metadata.queries = queries
            return metadata

    recording = subclass_attention_backend("Recording", backend, RecordingBuilder)
    if writes_rows:
        recording.forward_includes_kv_cache_update = True
    return recording
