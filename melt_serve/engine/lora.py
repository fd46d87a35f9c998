"""LoRA where MELT differs: keys and values, projected together from h, and steps whose tokens become fewer."""

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
    """The adapters of `k_proj` and `v_proj` on a `QKVParallelLinear` without query heads."""

    def __init__(self, base_layer: QKVParallelLinear) -> None:
        super().__init__(base_layer)
        self.n_slices = 2
        self.output_slices = (self.kv_proj_shard_size, self.kv_proj_shard_size)
        self.output_ids = (self.kv_shard_id, self.kv_shard_id)

    @classmethod
    def can_replace_layer(
        cls, source_layer: nn.Module, lora_config: LoRAConfig, packed_modules_list: list[str], *args: Any, **kwargs: Any
    ) -> bool:
        """Whether this is such a layer; adapters split over ranks (`--fully-sharded-loras`) are refused at start-up."""
        return type(source_layer) is QKVParallelLinear and len(packed_modules_list) == 2


class TokenAdapters:
    """Which adapter each token of a step has, by vLLM's own tables, while tokens leave the step."""

    def __init__(self, layer: nn.Module):
        """`layer` is any linear layer of the model; without adapters nothing is done."""
        self.tables = getattr(layer, "punica_wrapper", None)

    def keep(self, staying: Tensor) -> None:
        """Go on with the tokens for which `staying`, [A], is true."""
        if self.tables is not None:
            self._set(self.tables.token_lora_indices[: len(staying)][staying])

    @contextmanager
    def only(self, tokens: Tensor) -> Iterator[None]:
        """What is computed inside is of the tokens for which `tokens`, [A], is true."""
        with self.restored():
            self.keep(tokens)
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the tables back in the end: vLLM writes them only when a step's adapters differ from the last one's."""
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
