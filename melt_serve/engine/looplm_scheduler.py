"""A LoopLM's requests of mixed depths, and what they may share of each other's prefixes."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from melt_serve.engine.depth import depth_of
from melt_serve.engine.depth_scheduler import DepthScheduler, salt_with_depth
from melt_serve.engine.looplm_cache import LoopRowsManager
from melt_serve.engine.scheduler_stats import StepCounts


class LoopLMScheduler(DepthScheduler):
    """vLLM's scheduler, with a cache manager that knows how many loops each request runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        (rows,) = manager.coordinator.single_type_managers
        assert isinstance(rows, LoopRowsManager)
        rows.depths = self.depths
        self.rows = rows
        # Events of the KV cache name a loop where vLLM's name a group: it describes each as it does its one group.
        manager.kv_cache_event_metadata *= rows.kv_cache_spec.max_loops
        manager.coordinator.emit_cached_block_events = rows.emit_cached_block_events

    def add_request(self, request: Request) -> None:
        """Enqueue a request. Where tokens may exit, later rows stand for others: then its depth is in its hashes."""
        depth = depth_of(request.sampling_params)
        if depth.exit_threshold < 1:
            salt_with_depth(request, depth)
        super().add_request(request)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        self.rows.loops_wanted = self.depths[request.request_id].loops
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _count_blocks(self, counts: StepCounts) -> None:
        counts.final_blocks = counts.looplm_blocks = self._blocks_in_use()
