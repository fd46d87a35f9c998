"""LoRA where MELT differs: keys and values are projected together from h, and tokens leave a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.config.lora import LoRAConfig
from vllm.lora import utils
from vllm.lora.layers import MergedQKVParallelLinearWithLoRA
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.platforms import current_platform

from melt_serve.engine import patches


class KVParallelLinearWithLoRA(MergedQKVParallelLinearWithLoRA):
    """Adapters of `k_proj` and `v_proj` on a `QKVParallelLinear` without query heads."""

    def __init__(self, base_layer: QKVParallelLinear) -> None:
        super().__init__(base_layer)
        self.n_slices = 2
        self.output_slices = (self.kv_proj_shard_size, self.kv_proj_shard_size)
        self.output_ids = (self.kv_shard_id, self.kv_shard_id)

    @classmethod
    def can_replace_layer(
        cls, source_layer: nn.Module, lora_config: LoRAConfig, packed_modules_list: list[str], *args: Any, **kwargs: Any
    ) -> bool:
        """Return whether this is such a layer; `--fully-sharded-loras`, which splits it, is refused at start-up."""
        return type(source_layer) is QKVParallelLinear and len(packed_modules_list) == 2


class TokenAdapters:
    """Keeps vLLM's table of each token's adapter true while tokens leave a step."""

    def __init__(self, layer: nn.Module):
        """Take the tables of `layer`, any linear layer of the model; without adapters all methods do nothing."""
        self.tables = getattr(layer, "punica_wrapper", None)

    def keep(self, tokens: slice | Tensor) -> None:
        """Go on with some of the A tokens of the loop before."""
        if self.tables is not None:
            self._set(self.tables.token_lora_indices[tokens])

    @contextmanager
    def selected(self, tokens: Tensor) -> Iterator[None]:
        """Restrict what is computed inside to some of the A tokens."""
        with self.restored():
            self.keep(tokens)
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the tables at the end: vLLM writes them only when a step's adapters differ from the last one's."""
        before = None if self.tables is None else self.tables.token_lora_indices.clone()
        try:
            yield
        finally:
            if before is not None:
                self._set(before)

    def _set(self, adapters: Tensor) -> None:
        tables = self.tables
        assert tables is not None
        tables._token_lora_indices[: len(adapters)] = adapters
        tables.indices_len[0] = len(adapters)
        if not current_platform.is_cpu():
            tables.token_mapping_meta.prepare_tensors(adapters)
        elif tables.is_prefill:
            tables._update_prefill_metadata(adapters)


if current_platform.is_cpu():
    patches.keep_an_empty_adapter_slot()
if KVParallelLinearWithLoRA not in utils._all_lora_classes:
    utils._all_lora_classes += (KVParallelLinearWithLoRA,)
