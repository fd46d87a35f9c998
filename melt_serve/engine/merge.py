"""Weights of linear layers laid side by side, so that one matmul does the work of several."""

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod


def may_merge(vllm_config: VllmConfig) -> bool:
    """Return whether nothing stands between a linear layer and its weight.

    That would be adapters of its own, weights that come and go, or kernels whose sums do not depend on the batch.
    """
    offload = vllm_config.offload_config
    offloaded = offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
    return vllm_config.lora_config is None and not offloaded and not envs.VLLM_BATCH_INVARIANT


def merge(*layers: LinearBase) -> Tensor | None:
    """Lay the weights of layers side by side, and let each layer keep its own as a part of that.

    Weights that are loaded again go there, too, and layers still run alone.

    Returns:
        [sum of output sizes, input size]; None if vLLM has put a weight into another form: it is quantized, or packed
        for a CPU, where matmuls on packed weights are faster than merged ones.
    """
    plain = all(type(each.quant_method) is UnquantizedLinearMethod and each.weight.ndim == 2 for each in layers)
    if not plain or len({each.weight.dtype for each in layers}) > 1:
        return None
    merged = torch.cat([each.weight.data for each in layers])
    parts = merged.split([len(each.weight) for each in layers])
    for each, part in zip(layers, parts, strict=True):
        each.weight.data = part
    return merged
