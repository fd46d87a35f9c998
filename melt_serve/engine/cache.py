"""KV rows in vLLM's cache: which of a token's are kept, shared with other requests, and freed.

Rules 2 and 3 of the serving contract (README.md in this folder). A block of the pool holds rows of one
kind at a time: final rows, or an open chunk's rows of one loop. All have the same size, so one allocation
serves them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager, FullAttentionManager
from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from melt_serve.config import DecodeMode, sharing_unit
from melt_serve.engine.depth import Depth

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


class OpenRowsManager(CircularBufferManager):
    """Keeps the rows that an open chunk needs of loops before a request's last.

    A request of d loops has d - 1 blocks for every block of its open chunk, of loops 1 to d - 1 in this order. They
    are taken when a step first reaches that part of a chunk, and serve all its chunks, one after another, until the
    request is finished or preempted: a worker's block table only grows. A chunk that runs whole in one step needs
    none, because it can write its final blocks at every loop; no step with drafts is one (`tokens_in_step` in
    scheduler.py).

    Attributes:
        depths: of the scheduler's requests, by id.
    """

    def __init__(self, kv_cache_spec: "OpenRowsSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.chunk_size = kv_cache_spec.chunk_size
        self.depths: Mapping[str, Depth] = {}

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
        """Return how many blocks the request's first `num_tokens` tokens need from the pool beside those it has."""
        if apply_admission_cap:  # the most it needs on its way there: any of its chunks may be open after a step
            return self.missing_blocks(request_id, min(num_tokens, self.chunk_size - 1))
        return self.missing_blocks(request_id, num_tokens_main_model, num_tokens - num_tokens_main_model)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Take what `get_num_blocks_to_allocate` has said."""
        missing = self.missing_blocks(request_id, num_tokens_main_model, num_tokens - num_tokens_main_model)
        if not missing:
            return []
        new_blocks = self.block_pool.get_new_blocks(missing)
        self.req_to_blocks[request_id].extend(new_blocks)
        return new_blocks

    def missing_blocks(self, request_id: str, num_tokens: int, ahead: int = 0) -> int:
        """Return how many blocks a step that ends at `num_tokens` lacks.

        A request without blocks has run whole chunks only, so where the step ends a chunk it runs the whole of it.

        Args:
            request_id: whose.
            num_tokens: of the request, at the end of the step.
            ahead: drafts that the step guesses behind them; those of another chunk than the last token's are left out.
        """
        later_loops = self.depths[request_id].loops - 1
        if not later_loops:
            return 0
        held = len(self.req_to_blocks.get(request_id, ()))
        begun = num_tokens % self.chunk_size  # tokens of the chunk that is open behind the step
        needed = begun or (self.chunk_size if held else 0)
        needed = max(needed, min(begun + ahead, self.chunk_size))
        return max(0, cdiv(needed, self.block_size) * later_loops - held)

    def num_blocks_in_use(self) -> int:
        """Return how many blocks all requests hold."""
        return sum(map(len, self.req_to_blocks.values()))


@register_kv_cache_spec(manager_class=OpenRowsManager)
@dataclass(frozen=True, kw_only=True)
class OpenRowsSpec(CircularBufferSpec):
    """Rows of the loops before the last, for the tokens of a request's open chunk: `chunk` mode only.

    Attributes:
        chunk_size: C, a multiple of the block size.
        max_loops: the most loops that a request may run.
    """

    chunk_size: int
    max_loops: int

    @property
    def max_blocks(self) -> int:
        """The most blocks that a request holds."""
        return (self.max_loops - 1) * self.chunk_size // self.block_size

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Return the most bytes a layer keeps of one request."""
        return self.max_blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: "VllmConfig", max_len: int) -> int:
        """Return the length of a row of the worker's block table.

        vLLM's older runner (V1) looks up a slot of every token here, too, as if blocks went by position.
        """
        return max(self.max_blocks, cdiv(max_len, self.block_size))
