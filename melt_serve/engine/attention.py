"""Which rows a loop reads and writes: attention layers over vLLM's paged cache.

In `token` mode all loops share one layer, whose slots each loop overwrites. In `chunk` mode the loops
before the last have layers of their own. What such a layer sees is the final rows of closed chunks and
its own loop's rows of the open chunk: two block tables laid over each other.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from melt_serve.config import MeltConfig
from melt_serve.engine.cache import FinalRowsSpec, OpenRowsSpec


class FinalRows(Attention):
    """Attention over final rows; in `token` mode every loop writes them, in `chunk` mode the last one."""

    attn_backend: Any  # a class of vLLM's, AttentionBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_metadata: Any = None
        """What this step's attention over final rows needs, for `OpenRows` to start from."""
        if get_current_vllm_config().model_config.hf_config.decode_mode == "chunk":
            self.attn_backend = final_rows_backend(self.attn_backend)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One row a token."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        config: MeltConfig = vllm_config.model_config.hf_config
        return FinalRowsSpec(**vars(spec), chunk_size=config.chunk_size, decode_mode=config.decode_mode)


class OpenRows(Attention):
    """Attention of a loop before the last, in `chunk` mode."""

    attn_backend: Any

    def __init__(self, *args: Any, final: FinalRows, loop: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.final_name = final.layer_name
        self.loop = loop
        self.attn_backend = open_rows_backend(self.attn_backend)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One row a token of the open chunk."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        shared = {name: value for name, value in vars(spec).items() if name in OpenRowsSpec.__dataclass_fields__}
        return OpenRowsSpec(**shared, chunk_size=vllm_config.model_config.hf_config.chunk_size, loop=self.loop)


@functools.cache
def final_rows_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend that also leaves a step's metadata with its layer."""

    class FinalRowsBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        def __init__(self, kv_cache_spec: FinalRowsSpec, layer_names: list[str], vllm_config: VllmConfig, *args: Any):
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args)
            self.layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]

        def build(self, *args: Any, **kwargs: Any) -> Any:
            self.layer.step_metadata = super().build(*args, **kwargs)
            return self.layer.step_metadata

    return subclass_attention_backend("FinalRows", backend, FinalRowsBuilder)


@functools.cache
def open_rows_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend whose block tables and slots are those of one loop before the last."""

    class OpenRowsBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False

        def __init__(self, kv_cache_spec: OpenRowsSpec, layer_names: list[str], vllm_config: VllmConfig, *args: Any):
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args)
            layers = vllm_config.compilation_config.static_forward_context
            # The group of each loop holds one layer for every layer of the model, in the same order.
            self.final = layers[layers[layer_names[0]].final_name]
            self.null_slots = vllm_config.cache_config.block_size

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            return AttentionCGSupport.NEVER  # tables are new tensors in every step

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            """The final rows' metadata of this step, with this loop's block table and slots."""
            final, own = self.final.step_metadata, common_attn_metadata
            block_size, chunk_size = self.kv_cache_spec.block_size, self.kv_cache_spec.chunk_size
            metadata = copy.copy(final)
            metadata.block_table = lay_over(
                own.block_table_tensor, final.block_table, own.seq_lens, chunk_size, block_size, self.null_slots
            )
            # In place: vLLM hands out this very tensor as the layers' slot mapping.
            slots = own.slot_mapping
            slots.copy_(torch.where(slots < self.null_slots, final.slot_mapping[: len(slots)], slots))
            metadata.slot_mapping = slots
            return metadata

    return subclass_attention_backend("OpenRows", backend, OpenRowsBuilder)


def lay_over(own: Tensor, final: Tensor, seq_lens: Tensor, chunk_size: int, block_size: int, null_slots: int) -> Tensor:
    """The block table of a loop before the last: final blocks, but the open chunk's own where it has them.

    Args:
        own: [R, blocks], blocks of this loop; the null block where there is none, anything in closed chunks.
        final: [R, blocks], blocks of final rows.
        seq_lens: [R], tokens of each request up to the end of this step, which lies in the open chunk.
        chunk_size: C, a multiple of `block_size`, the tokens in one entry of the tables.
        null_slots: slots below this are in the null block.
    """
    open_block = (seq_lens - 1) // chunk_size * (chunk_size // block_size)
    columns = torch.arange(own.shape[1], device=own.device)
    kept = (columns >= open_block[:, None]) & (own * block_size >= null_slots)
    return torch.where(kept, own, final)
