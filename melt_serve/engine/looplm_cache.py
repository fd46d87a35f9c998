"""A LoopLM's rows in vLLM's cache: a block holds rows of one loop, and a request has blocks for its own loops only.

In the block table of a request of d loops, loop t's rows of its b-th block of tokens, counted from 0, are entry
b * d + t - 1 (`TablesByLoop` in tables.py). Without exits, rows of loop t are the same whatever loops follow. So every
block is shared under its tokens and its loop, and a request of d loops hits what was computed with d or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

from vllm.utils.math_utils import round_up
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from melt_serve.engine.depth import Depth

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM registers its own specs only while the registry is empty: ours must not be the first.
KVCacheSpecRegistry._ensure_registered()


class LoopRowsManager(FullAttentionManager):
    """Gives a request a block for each of its loops and each block of its tokens.

    Where vLLM names a cache group to tell blocks of the same tokens apart, this names the loop, counted from 0.

    Attributes:
        depths: of the scheduler's requests, by id.
        loops_wanted: of the request that is looked up next, which vLLM does not name.
    """

    def __init__(self, kv_cache_spec: "LoopRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.depths: Mapping[str, Depth] = {}
        self.loops_wanted = 1

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Return how many blocks the request's first `num_tokens` tokens need from the pool beside those it has."""
        return super().get_num_blocks_to_allocate(request_id, self.rows(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Take what `get_num_blocks_to_allocate` has said."""
        return super().allocate_new_blocks(request_id, self.rows(request_id, num_tokens), num_tokens_main_model)

    def rows(self, request_id: str, num_tokens: int) -> int:
        """Return the rows a layer that there must be room for: whole blocks, of every loop."""
        return round_up(num_tokens, self.block_size) * self.depths[request_id].loops

    def find_longest_cache_hit(  # type: ignore[override]  # vLLM calls it on the manager, too
        self, *args: Any, kv_cache_group_ids: list[int], **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Look a prefix up as vLLM does; a hit ends before the first block of which a wanted loop is missing."""
        loops = list(range(self.loops_wanted))
        by_loop, tokens = super().find_longest_cache_hit(*args, kv_cache_group_ids=loops, **kwargs)
        return (list(chain.from_iterable(zip(*by_loop, strict=True))),), tokens

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Make full blocks findable, each under its loop."""
        request_id, blocks = request.request_id, self.req_to_blocks[request.request_id]
        loops, full = self.depths[request_id].loops, num_tokens // self.block_size
        cached = self.num_cached_block.get(request_id, 0) // loops
        if cached >= full:
            return
        for loop in range(loops):
            self.block_pool.cache_full_blocks(request, blocks[loop::loops], cached, full, self.block_size, loop)
        self.num_cached_block[request_id] = full * loops

    def emit_cached_block_events(self, request: Request, computed_blocks: tuple[list[KVCacheBlock], ...]) -> None:
        """Tell of the blocks that a request has hit, loop by loop; vLLM takes a block for one of its tokens."""
        hit = len(computed_blocks[0]) // self.loops_wanted
        for loop in range(self.loops_wanted):
            self.block_pool.emit_cached_block_events(request, hit, self.block_size, loop)


@register_kv_cache_spec(manager_class=LoopRowsManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class LoopRowsSpec(FullAttentionSpec):
    """One layer's rows for all of a request's tokens, in each of its loops.

    Attributes:
        max_loops: the most loops that a request may run.
    """

    max_loops: int

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Return the spec of a group of layers, which must agree."""
        assert all(spec == specs[0] for spec in specs), "layers of one group must keep the same rows"
        return specs[0]

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Return the most bytes a layer keeps of one request."""
        return self.max_loops * super().max_memory_usage_bytes(vllm_config)

    def max_num_blocks_per_req(self, vllm_config: "VllmConfig", max_len: int) -> int:
        """Return the length of a row of the worker's block table."""
        return self.max_loops * super().max_num_blocks_per_req(vllm_config, max_len)
