"""The chunk grid: which tokens of a request may run in one step (engine/README.md)."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request


class ChunkGridScheduler(AsyncScheduler):
    """vLLM's scheduler, with every step of a request ending on the request's own chunk grid.

    vLLM asks `_mamba_block_aligned_split` before it runs a part of a request, for models whose steps
    must end at certain positions; MELT is such a model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunk_size: int = self.vllm_config.model_config.hf_config.chunk_size
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        return tokens_in_step(start, num_new_tokens, request.num_prompt_tokens, self.chunk_size)


def tokens_in_step(start: int, wanted: int, prompt_length: int, chunk_size: int) -> int:
    """How many tokens of a request run in a step, in `token` mode.

    A prompt chunk runs whole or not at all; a generated token is a chunk of its own, also when a
    preempted request is replayed.

    Args:
        start: the position of the first token to run.
        wanted: tokens that are there and that the step's budget admits.
        prompt_length: the request's own prompt, without generated tokens.
        chunk_size: C.

    Returns:
        At most `wanted`; 0 for "not in this step".
    """
    if start >= prompt_length:
        return min(wanted, 1)
    rest_of_chunk = min((start // chunk_size + 1) * chunk_size, prompt_length) - start
    return rest_of_chunk if wanted >= rest_of_chunk else 0
