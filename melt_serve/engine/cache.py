"""KV rows in vLLM's cache: what is kept of a token, shared with other requests, and given back.

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

from melt_serve.config import DecodeMode, sharing_unit
from melt_serve.engine.depth import depth_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM registers its own specs only while the registry is empty: ours must not be the first.
KVCacheSpecRegistry._ensure_registered()


class FinalRowsManager(FullAttentionManager):
    """One row a (layer, token), that of its last loop. Shared from lcm(C, block) to lcm(C, block)."""

    def __init__(self, kv_cache_spec: "FinalRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.cached_this_step: set[int] = set()
        """Blocks vLLM has made findable in this step, before their final rows exist."""

    def shareable(self, request: Request) -> int:
        """From this position on, the request neither gives nor takes shared rows.

        In `token` mode generated rows were made with C=1: for the same tokens a prompt has others.
        """
        if self.spec.decode_mode == "chunk":
            return request.num_tokens
        return request.num_prompt_tokens // self.spec.unit * self.spec.unit

    @classmethod
    def find_longest_cache_hit(
        cls, *args: Any, kv_cache_spec: KVCacheSpec, alignment_tokens: int, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """vLLM's lookup, whose hits end where a chunk and a block end together."""
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
        """Make full blocks findable, up to where the request shares; remember which are new."""
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(
            request,
            min(num_tokens, self.shareable(request)),
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )
        after = self.num_cached_block.get(request.request_id, 0)
        new_blocks = self.req_to_blocks[request.request_id][before:after]
        self.cached_this_step.update(block.block_id for block in new_blocks)

    def new_step_starts(self) -> None:
        """What earlier steps have computed may be hit now."""
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
        """Tokens between two positions where a prefix may end: lcm(C, block)."""
        return sharing_unit(self.chunk_size, self.block_size)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The spec of a group of layers, which must agree."""
        assert all(spec == specs[0] for spec in specs), "layers of one group must keep the same rows"
        return specs[0]


class OpenRowsManager(SingleTypeKVCacheManager):
    """Rows of one loop before the last, of the open chunk only; free again once the chunk is closed.

    The block list has an entry for every block of the request, as the final rows' list has, so that the
    two can be laid over each other. It is the null block where no rows of this loop are kept: in closed
    chunks, in a chunk that runs whole in one step, which can write its final blocks at every loop, and in
    requests to which this is the last loop, or that never come here.
    """

    def __init__(self, kv_cache_spec: "OpenRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.chunk_size, self.loop = kv_cache_spec.chunk_size, kv_cache_spec.loop
        self.requests: Mapping[str, Request] = {}
        """The scheduler's, by id, to know their loops."""

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
        """Blocks to take from the pool so that `num_tokens` tokens have their rows of this loop."""
        if apply_admission_cap and self._comes_before_last(request_id):  # the most a request holds on its way there
            return cdiv(min(num_tokens, self.chunk_size), self.block_size)
        entries = max(len(self.req_to_blocks.get(request_id, ())), total_computed_tokens // self.block_size)
        return 0 if self._keeps_nothing(request_id, num_tokens) else max(0, cdiv(num_tokens, self.block_size) - entries)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Append the entries of the step's tokens: blocks, or null blocks where nothing is kept."""
        blocks = self.req_to_blocks[request_id]
        missing = max(0, cdiv(num_tokens, self.block_size) - len(blocks))
        if self._keeps_nothing(request_id, num_tokens):
            new_blocks = [self._null_block] * missing
        else:
            new_blocks = self.block_pool.get_new_blocks(missing)
        blocks.extend(new_blocks)
        return new_blocks

    def held(self) -> int:
        """Blocks in use for rows of this loop."""
        entries = cdiv(self.chunk_size, self.block_size)  # the open chunk's are a request's last
        return sum(not block.is_null for blocks in self.req_to_blocks.values() for block in blocks[-entries:])

    def _keeps_nothing(self, request_id: str, num_tokens: int) -> bool:
        """Whether the step that ends at `num_tokens` needs no rows of this loop.

        So it is from the request's last loop on, and where the step closes a chunk of which nothing ran before.
        """
        first = (num_tokens - 1) // self.chunk_size * self.chunk_size // self.block_size
        begun = any(not block.is_null for block in self.req_to_blocks.get(request_id, ())[first:])
        closes_at_once = num_tokens % self.chunk_size == 0 and not begun
        return closes_at_once or not self._comes_before_last(request_id)

    def _comes_before_last(self, request_id: str) -> bool:
        return self.loop < depth_of(self.requests[request_id].sampling_params).loops

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens in closed chunks: vLLM frees their blocks."""
        return num_computed_tokens // self.chunk_size * self.chunk_size

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
        """Nothing: an open chunk's rows belong to one request."""
        return tuple([] for _ in kv_cache_group_ids), 0


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
        """They are never shared."""
        return False

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes a layer keeps of one request at most: one chunk for every step that may be in flight."""
        chunks = vllm_config.max_concurrent_batches
        tokens = min(chunks * self.chunk_size, vllm_config.model_config.max_model_len)
        return cdiv(tokens, self.block_size) * self.page_size_bytes
