"""A LoopLM's attention layers over vLLM's paged cache: one for each loop of a layer, called by the first one's name.

The name is what vLLM's operators look a layer up by. So all loops are the same computation, which is compiled once, and
the forward context says whose rows are meant (`Loops.selected`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from melt_serve.engine.attention import StepRecord, over_gaps, recording_backend, refuse_backend, refuse_rows
from melt_serve.engine.looplm_cache import LoopRowsSpec
from melt_serve.engine.step import Running, StepPlan, to_device


@dataclass(frozen=True)
class Copies:
    """Where the rows of a loop are written once more, for tokens that may exit after it.

    Attributes:
        slots: [A], of the tokens that run; negative for those that never exit early.
        counts: of each later loop, counted from 1, how many tokens may run it, the first ones.
    """

    slots: Tensor
    counts: dict[int, int]


class LoopRows(Attention):
    """One layer's attention in one loop, and the rows of that loop.

    Attributes:
        loops: the same layer's attention in all loops.
        copies: of the loop that runs; None where no token may exit after it.
    """

    attn_backend: Any
    step: StepRecord
    loops: Sequence["LoopRows"] = ()
    copies: Copies | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_backend(self)
        refuse_rows(self)
        self.attn_backend = recording_backend(self.attn_backend)
        self.impl.forward = over_gaps(self.impl.forward)
        self.write_once = self.impl.do_kv_cache_update
        self.impl.do_kv_cache_update = self.write

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the spec of one loop's rows."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec
        return LoopRowsSpec(**vars(spec))

    def write(self, layer: Attention, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Write a step's rows of this loop as vLLM does, and to later loops where a token may exit after this one.

        A token that runs on writes its own row over the copy. One that exits has left it there: its last loop's row
        stands for the loops that it does not run.
        """
        self.write_once(layer, key, value, kv_cache, slots)
        if self.copies is None:
            return
        for loop, count in self.copies.counts.items():
            later = self.loops[loop - 1]
            self.write_once(later, key[:count], value[:count], later.kv_cache, self.copies.slots[:count])


class Loops:
    """The rows of all layers and loops of a model."""

    def __init__(self, layers: Sequence[Sequence[LoopRows]]):
        """Take each layer's attention in all loops."""
        self.layers = layers
        for layer in layers:
            for rows in layer:
                rows.loops = layer
        self.first = [layer[0] for layer in layers]

    @contextmanager
    def selected(self, loop: int, copies: Copies | None = None) -> Iterator[None]:
        """Let attention layers that are called inside read and write this loop's rows, and write copies."""
        context = get_forward_context()
        chosen = {layer[0].layer_name: layer[loop - 1] for layer in self.layers}
        for rows in chosen.values() if copies is not None else ():
            rows.copies = copies
        try:
            with override_forward_context(replace(context, no_compile_layers={**context.no_compile_layers, **chosen})):
                yield
        finally:
            for rows in chosen.values() if copies is not None else ():
                rows.copies = None


def copies_of(loop: int, plan: StepPlan, running: Running) -> Copies | None:
    """Return where rows of this loop are written once more; None where no token may exit after it."""
    sequences = running.sequences
    if not plan.waits_for_exits(loop, sequences):
        return None
    slots = running.metadata.slot_mapping[: sequences.size]
    may_exit = plan.thresholds[sequences.requests] < 1
    if not may_exit.all():
        (mask,) = to_device(slots.device, sequences.of_tokens(may_exit).astype(np.int32))
        slots = torch.where(mask.bool(), slots, PAD_SLOT_ID)
    later = range(loop + 1, int(plan.loops[sequences.requests].max()) + 1)
    return Copies(slots, {other: plan.tokens_after(other - 1, sequences) for other in later})
