"""A worker process leaves weights of linear layers as they are loaded, like on a GPU; a CPU packs them.

For engines on several ranks, whose workers are processes of their own: `worker_extension_cls` imports this there.
"""

from typing import Any

import torch
from vllm.model_executor.layers import utils


def leave_as_loaded(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Take the place of vLLM's packing."""
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = leave_as_loaded


class PlainWeights:
    """What a test may ask the worker: `LLM.collective_rpc`."""

    model_runner: Any

    def has_merged(self) -> bool:
        """Return whether all matmuls that may be merged are."""
        melt = self.model_runner.get_model().model
        inputs = [layer.self_attn.merged_input for layer in melt.layers]
        return all(each is not None for each in (melt.merged_state, *inputs))
