"""A LoopLM's attention layers over vLLM's paged cache: one a layer, whose tables say which loop's rows are meant."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from melt_serve.config import LoopLMConfig
from melt_serve.engine.attention import StepRecord, over_gaps, recording_backend, refuse_backend, refuse_rows
from melt_serve.engine.looplm_cache import LoopRowsSpec
from melt_serve.engine.step import Running, StepPlan, to_device


class LoopRows(Attention):
    """A layer's attention, and the rows it keeps of every token and loop."""

    attn_backend: Any
    step: StepRecord

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_backend(self)
        refuse_rows(self)
        self.attn_backend = recording_backend(self.attn_backend)
        self.impl.forward = over_gaps(self.impl.forward)
        self.write_once = self.impl.do_kv_cache_update
        self.impl.do_kv_cache_update = self.write

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the spec of a row for each token and loop."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        config: LoopLMConfig = vllm_config.model_config.hf_config
        return LoopRowsSpec(**vars(spec), max_loops=config.most_loops)

    def write(self, layer: Attention, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Write a step's rows as vLLM does: to slots [A] or, with copies, to each of [1 + copies, A]."""
        for each in slots if slots.dim() == 2 else (slots,):
            self.write_once(layer, key, value, kv_cache, each)


def copies_of(loop: int, plan: StepPlan, running: Running) -> Tensor | None:
    """Return where rows of this loop are written once more, [later loops, A]; None where no token may exit after it.

    A token that runs on writes its own row over the copy. One that exits has left it there: its last loop's row stands
    for the loops that it does not run.
    """
    sequences = running.sequences
    if not plan.waits_for_exits(loop, sequences):
        return None
    slots = running.slots_after(loop, slice(sequences.size))
    may_exit = plan.thresholds[sequences.requests] < 1
    if not may_exit.all():
        (mask,) = to_device(slots.device, sequences.of_tokens(may_exit).astype(np.int32))
        slots = torch.where(mask.bool(), slots, PAD_SLOT_ID)
    return slots
