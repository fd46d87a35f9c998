"""KV rows in vLLM's cache: which of a token's are kept, shared with other requests, and freed.

Rules 2 and 3 of the serving contract (README.md in this folder). A block of the pool holds rows of one
kind at a time: final rows, or an open chunk's rows of one loop. All kinds have the same size, so one
allocation serves them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from melt_serve.config import DecodeMode, chunk_start, sharing_unit
from melt_serve.engine.depth import depth_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM registers its own specs only while the registry is empty: ours must not be the first.
KVCacheSpecRegistry._ensure_registered()


class FinalRowsManager(FullAttentionManager):
    """Keeps one row a (layer, token), that of its last loop. Hits end on multiples of lcm(C, block).

    Attributes:
        cached_this_step: blocks that vLLM has made findable in this step, before their final rows exist.
    """

    def __init__(self, kv_cache_spec: "FinalRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.cached_this_step: set[int] = set()

    def cacheable_tokens(self, request: Request) -> int:
        """Return how many tokens of a request may share rows with others; it neither gives nor hits later ones.

        In `token` mode generated rows were made with C=1: for the same tokens a prompt has others.
        """
        if self.spec.decode_mode == "chunk":
            return request.num_tokens
        return request.num_prompt_tokens // self.spec.unit * self.spec.unit

    @classmethod
    def find_longest_cache_hit(
        cls, *args: Any, kv_cache_spec: KVCacheSpec, alignment_tokens: int, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Look a prefix up as vLLM does; a hit ends where a chunk and a block end together."""
        assert isinstance(kv_cache_spec, FinalRowsSpec) and kv_cache_spec.unit % alignment_tokens == 0
        return super().find_longest_cache_hit(
            *args, kv_cache_spec=kv_cache_spec, alignment_tokens=kv_cache_spec.unit, **kwargs
        )

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Make full blocks of cacheable tokens findable, and remember which are new."""
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(
            request,
            min(num_tokens, self.cacheable_tokens(request)),
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )
        after = self.num_cached_block.get(request.request_id, 0)
        new_blocks = self.req_to_blocks[request.request_id][before:after]
        self.cached_this_step.update(block.block_id for block in new_blocks)

    def new_step_starts(self) -> None:
        """Forget what was new: blocks of earlier steps are computed and may be hit."""
        self.cached_this_step.clear()


@register_kv_cache_spec(manager_class=FinalRowsManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class FinalRowsSpec(FullAttentionSpec):
    """Rows for all of a request's tokens, one a token whatever the loops.

    Attributes:
        chunk_size: C.
        decode_mode: whether generated tokens fill the chunk grid.
    """

    chunk_size: int
    decode_mode: DecodeMode

    @property
    def unit(self) -> int:
        """Tokens between two positions where a hit may end: lcm(C, block)."""
        return sharing_unit(self.chunk_size, self.block_size)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Return the spec of a group of layers, which must agree."""
        assert all(spec == specs[0] for spec in specs), "layers of one group must keep the same rows"
        return specs[0]


class OpenRowsManager(SingleTypeKVCacheManager):
    """Keeps the open chunk's rows of one loop before the last, and frees them when the chunk closes.

    The block list has an entry for every block of the request, as the final rows' list has, so that the
    two can be laid over each other. It is the null block where no rows of this loop are kept: in closed
    chunks, in a chunk that runs whole in one step, which can write its final blocks at every loop, and in
    requests whose last loop is this one or an earlier one.

    Attributes:
        requests: the scheduler's, by id, whose parameters state their loops.
    """

    def __init__(self, kv_cache_spec: "OpenRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.chunk_size = kv_cache_spec.chunk_size
        self.loop = kv_cache_spec.loop
        self.requests: Mapping[str, Request] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Return how many blocks `num_tokens` tokens need from the pool for their rows of this loop."""
        if apply_admission_cap and self._runs_later_loops(request_id):  # the most a request holds on its way there
            return cdiv(min(num_tokens, self.chunk_size), self.block_size)
        if not self._needs_blocks(request_id, num_tokens):
            return 0
        entries = max(len(self.req_to_blocks.get(request_id, ())), total_computed_tokens // self.block_size)
        return max(0, cdiv(num_tokens, self.block_size) - entries)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Append the entries of the step's tokens: blocks from the pool, or null blocks where no rows are kept."""
        blocks = self.req_to_blocks[request_id]
        missing = max(0, cdiv(num_tokens, self.block_size) - len(blocks))
        if self._needs_blocks(request_id, num_tokens):
            new_blocks = self.block_pool.get_new_blocks(missing)
        else:
            new_blocks = [self._null_block] * missing
        blocks.extend(new_blocks)
        return new_blocks

    def num_blocks_in_use(self) -> int:
        """Return how many blocks hold rows of this loop, over all requests."""
        entries = cdiv(self.chunk_size, self.block_size)  # the open chunk's are a request's last
        return sum(not block.is_null for blocks in self.req_to_blocks.values() for block in blocks[-entries:])

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return how many tokens lie in closed chunks: vLLM frees their blocks."""
        return chunk_start(num_computed_tokens, self.chunk_size)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Return no blocks: an open chunk's rows belong to one request."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def _needs_blocks(self, request_id: str, num_tokens: int) -> bool:
        """Return whether the step that ends at `num_tokens` keeps rows of this loop.

        A request's last loop writes final rows; so does a step that runs a whole chunk, at every loop.
        """
        first = chunk_start(num_tokens - 1, self.chunk_size) // self.block_size
        open_before = any(not block.is_null for block in self.req_to_blocks.get(request_id, ())[first:])
        runs_whole_chunk = num_tokens % self.chunk_size == 0 and not open_before
        return not runs_whole_chunk and self._runs_later_loops(request_id)

    def _runs_later_loops(self, request_id: str) -> bool:
        return self.loop < depth_of(self.requests[request_id].sampling_params).loops


@register_kv_cache_spec(manager_class=OpenRowsManager)
@dataclass(frozen=True, kw_only=True)
class OpenRowsSpec(AttentionSpec):
    """Rows of one loop for the tokens of a request's open chunk, at most C: `chunk` mode only.

    Attributes:
        chunk_size: C, a multiple of the block size.
        loop: t, counted from 1, below T. Each loop is a cache group with block tables of its own.
    """

    chunk_size: int
    loop: int

    @property
    def prefix_cacheable(self) -> bool:
        """Whether blocks may be shared: an open chunk's never are."""
        return False

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Return the most bytes a layer keeps of one request: one chunk for every step that may be in flight."""
        chunks = vllm_config.max_concurrent_batches
        tokens = min(chunks * self.chunk_size, vllm_config.model_config.max_model_len)
        return cdiv(tokens, self.block_size) * self.page_size_bytes
