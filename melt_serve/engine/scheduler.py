"""The chunk grid: which tokens of a request may run in one step (README.md, rules 1 to 4)."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from melt_serve.config import DecodeMode, MeltConfig, chunk_end
from melt_serve.engine.cache import FinalRowsManager, OpenRowsManager
from melt_serve.engine.depth import depth_of
from melt_serve.engine.depth_scheduler import DepthScheduler, salt_with_depth
from melt_serve.engine.scheduler_stats import StepCounts
from melt_serve.engine.turns import PrefillTurns


class ChunkGridScheduler(DepthScheduler):
    """vLLM's scheduler, with every step of a request ending on the request's own chunk grid.

    vLLM calls `_mamba_block_aligned_split` before it runs a part of a request, for models whose steps
    must end at certain positions; MELT is such a model.

    Attributes:
        cut: requests whose part in this step ends with its chunk, though there is more to run.
        lost_hits: tokens that a waiting request cannot hit, by its id: they lie behind the last place where a hit
            may end.
        computed_before: tokens that preempted requests had run, by request id.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: MeltConfig = self.vllm_config.model_config.hf_config
        self.chunk_size = config.chunk_size
        self.decode_mode = config.decode_mode
        self.need_mamba_block_aligned_split = True
        self.turns = PrefillTurns(self, config.chunk_size)
        final_rows, *others = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(final_rows, FinalRowsManager)
        self.final_rows = final_rows
        self.open_rows: OpenRowsManager | None = None
        if others:
            (open_rows,) = others
            assert isinstance(open_rows, OpenRowsManager)
            open_rows.depths = self.depths
            self.open_rows = open_rows
        self.cut: set[str] = set()
        self.lost_hits: dict[str, int] = {}
        self.computed_before: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        """Enqueue a request, with its depth in its blocks' hashes: rows made at another depth are other rows."""
        salt_with_depth(request, depth_of(request.sampling_params))
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step as vLLM does, running requests first, unless a prompt has waited for them too long."""
        self.cut.clear()
        self.turns.begin_step()
        output = super().schedule(throttle_prefills)
        self.turns.end_step(output)
        self._count_step(output)
        return output

    def _count_blocks(self, counts: StepCounts) -> None:
        counts.open_blocks = 0 if self.open_rows is None else self.open_rows.num_blocks_in_use()
        counts.final_blocks = self._blocks_in_use() - counts.open_blocks
        tokens = sum(request.num_computed_tokens for request in self.running)
        looped = sum(request.num_computed_tokens * self.depths[request.request_id].loops for request in self.running)
        counts.looplm_blocks = round(counts.final_blocks * looped / tokens) if tokens else 0

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        wanted = self.turns.limit(request.request_id, num_new_tokens)
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        known = request.num_tokens + request.num_output_placeholders - start
        tokens = tokens_in_step(
            start, wanted, request.num_prompt_tokens, self.chunk_size, self.decode_mode, drafted=wanted > known
        )
        self.turns.scheduled += tokens
        if 0 < tokens < wanted:
            self.cut.add(request.request_id)
        if tokens == 0 and wanted > 0:
            self.counts.deferred += 1
        return tokens

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        # vLLM 0.33 hands over the most tokens that may be hit, where it has a limit of its own: ours is beside it.
        # A resumed request looks its generated tokens up, too: in token mode those rows are not on the grid.
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        limit = self.final_rows.cacheable_tokens(request)
        if hit > limit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, limit)
            hit = limit
        self.lost_hits[request.request_id] = self._cached_behind(request, hit)
        return blocks, hit, boundary, diverged

    def _cached_behind(self, request: Request, hit: int) -> int:
        """Return how many tokens right behind the hit have cached rows, up to where the next hit could end."""
        pool = self.kv_cache_manager.block_pool
        group = self.final_rows.kv_cache_group_id
        size = self.final_rows.block_size
        first = hit // size
        last = min(
            len(request.block_hashes), (request.num_tokens - 1) // size, first + self.final_rows.spec.unit // size
        )
        for block in range(first, last):
            if pool.get_cached_block(request.block_hashes[block], [group]) is None:
                return block * size - hit
        return last * size - hit

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM makes a block findable when it schedules it. For a plain model a hit in the same step is fine,
        # because rows are written before they are read; a final row is written by the last loop only. Such a
        # request is passed over in this step, and those behind it are not.
        if not super()._handle_blocked_waiting_request(request):
            return False
        if request.num_computed_tokens or not self.final_rows.cached_this_step:
            return True
        blocks, *_ = self._get_local_prefix_cache_hit(request)
        return self.final_rows.cached_this_step.isdisjoint(blocks.get_block_ids()[0])

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        # By priority, a request may be preempted in the very step that has scheduled it: blocks that vLLM has made
        # findable for it in this step are never computed.
        blocks = self.final_rows.req_to_blocks.get(request.request_id, ())
        never_computed = self.final_rows.cached_this_step.intersection(block.block_id for block in blocks)
        self.computed_before[request.request_id] = request.num_computed_tokens
        super()._preempt_request(request, timestamp, drop_stale_output)
        self.kv_cache_manager.evict_blocks(never_computed)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict | None, dict | None]:
        self.lost_hits.pop(request.request_id, None)
        self.computed_before.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _count_step(self, output: SchedulerOutput) -> None:
        """Add what this step does to the counts."""
        counts = self.counts
        scheduled = output.num_scheduled_tokens
        cached = output.scheduled_cached_reqs
        counts.pieces += len(scheduled)
        counts.cuts += len(self.cut & scheduled.keys())
        for request_id in scheduled:
            counts.lost_hit_tokens += self.lost_hits.pop(request_id, 0)
        begun = {
            new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs
        }  # resumed ones, too, under V2
        running = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id in self.computed_before.keys() & (begun | running).keys():
            counts.replays += 1
            counts.replayed_tokens += max(0, self.computed_before.pop(request_id) - (begun | running)[request_id])


def tokens_in_step(
    start: int,
    wanted: int,
    prompt_length: int,
    chunk_size: int,
    decode_mode: DecodeMode = "token",
    *,
    drafted: bool = False,
) -> int:
    """Return how many tokens of a request run in a step: none beyond the end of a chunk.

    In `token` mode a prompt chunk runs whole or not at all, and a generated token is a chunk of its own,
    also when a preempted request is replayed. In `chunk` mode a step may stop anywhere inside a chunk. One with
    drafts never runs a whole chunk: a whole chunk leaves no open rows (`OpenRowsManager` in cache.py), and tokens that
    take the place of drafts which prove wrong need them.

    Args:
        start: the position of the first token to run.
        wanted: tokens that the request has and the step's budget admits.
        prompt_length: the request's own prompt, without generated tokens.
        chunk_size: C.
        decode_mode: of the checkpoint.
        drafted: the last of the wanted tokens are drafts.

    Returns:
        At most `wanted`; 0 for "not in this step".
    """
    end = chunk_end(start, chunk_size)
    if decode_mode == "chunk":
        return min(wanted, end - start, chunk_size - drafted)
    if start >= prompt_length:
        return min(wanted, 1)
    rest_of_chunk = min(end, prompt_length) - start
    return rest_of_chunk if wanted >= rest_of_chunk else 0
