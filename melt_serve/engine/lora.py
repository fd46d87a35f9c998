"""LoRA on MELT's one layer that vLLM has no wrapper for: keys and values, projected together from h."""

from typing import Any

from torch import nn
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


if current_platform.is_cpu():
    patches.keep_an_empty_adapter_slot()
if KVParallelLinearWithLoRA not in utils._all_lora_classes:
    utils._all_lora_classes += (KVParallelLinearWithLoRA,)
