"""A LoopLM's rows in vLLM's cache: those of all loops, of which a prefix may hold fewer than a request needs.

A block has room for its tokens' rows of every loop. Without exits the rows of loop t are the same whatever loops
follow, so a request of d loops may use blocks that were computed with d or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from melt_serve.engine.depth import Depth

# vLLM registers its own specs only while the registry is empty: ours must not be the first.
KVCacheSpecRegistry._ensure_registered()


class LoopRowsManager(FullAttentionManager):
    """Keeps rows of every loop, and remembers how many loops a cached block holds.

    Attributes:
        depths: of the scheduler's requests, by id.
        loops_held: by block id, of cached blocks; of others it says nothing.
    """

    def __init__(self, kv_cache_spec: "LoopRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.depths: Mapping[str, Depth] = {}
        self.loops_held: dict[int, int] = {}

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Make full blocks findable as vLLM does, and remember the loops of those that are new."""
        request_id = request.request_id
        before = self.num_cached_block.get(request_id, 0)
        super().cache_blocks(
            request, num_tokens, retention_interval=retention_interval, replay_boundaries=replay_boundaries
        )
        after = self.num_cached_block.get(request_id, 0)
        for block in self.req_to_blocks[request_id][before:after]:
            self.loops_held[block.block_id] = self.depths[request_id].loops

    def shallower(self, blocks: Sequence[KVCacheBlock], loops: int) -> list[int]:
        """Return which of these cached blocks, by their index, hold the rows of fewer loops."""
        return [i for i, block in enumerate(blocks) if self.loops_held.get(block.block_id, 0) < loops]


@register_kv_cache_spec(manager_class=LoopRowsManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class LoopRowsSpec(FullAttentionSpec):
    """One loop's rows of one layer, for all of a request's tokens."""
