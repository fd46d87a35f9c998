"""A LoopLM's requests of mixed depths, and what they may share of each other's prefixes."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from melt_serve.engine.depth import depth_of
from melt_serve.engine.depth_scheduler import DepthScheduler, salt_with_depth
from melt_serve.engine.looplm_cache import LoopRowsManager
from melt_serve.engine.scheduler_stats import StepCounts


class LoopLMScheduler(DepthScheduler):
    """vLLM's scheduler, in which a request hits only blocks that hold the rows of its loops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows = next(
            each for each in self.kv_cache_manager.coordinator.single_type_managers if isinstance(each, LoopRowsManager)
        )
        self.rows.depths = self.depths

    def add_request(self, request: Request) -> None:
        """Enqueue a request. Where tokens may exit, later rows stand for others: then its depth is in its hashes."""
        depth = depth_of(request.sampling_params)
        if depth.exit_threshold < 1:
            salt_with_depth(request, depth)
        super().add_request(request)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        found = blocks.blocks[self.rows.kv_cache_group_id] if hit else ()
        if shallower := self.rows.shallower(found, self.depths[request.request_id].loops):
            # vLLM finds the oldest of several blocks with a hash: without them, the deeper ones that are about to be
            # computed are found, by requests of fewer loops, too.
            self.kv_cache_manager.evict_blocks({found[i].block_id for i in shallower})
            hit = shallower[0] * self.rows.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        return blocks, hit, boundary, diverged

    def _count_blocks(self, counts: StepCounts) -> None:
        counts.final_blocks = counts.looplm_blocks = self._blocks_in_use()
