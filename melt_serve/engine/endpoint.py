"""`GET /melt/info`: what the served model is and how deep it may think, through vLLM's endpoint plugins."""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig, kv_bytes_per_token


class Info(BaseModel):
    """Facts that do not change while the server runs.

    Attributes:
        models: the names it is served under.
        default_loops: T of requests that ask for none.
        max_loops: the most loops a request may ask for; a LoopLM's requests cannot choose.
        effort_loops: the loops that each `reasoning_effort` of OpenAI's asks for.
        exit_threshold: of requests that name none; at 1 no token leaves its loops early.
        kv_bytes_per_token: final rows of one token, over all layers of all devices.
        looplm_kv_bytes_per_token: the same of a LoopLM of this shape that runs the default loops.
        kv_capacity_tokens: tokens that the KV cache has room for, on each data-parallel rank.
    """

    models: list[str]
    architecture: str
    decode_mode: DecodeMode | None = None
    chunk_size: int | None = None
    default_loops: int
    max_loops: int
    effort_loops: dict[str, int] | None = None
    exit_threshold: float | None = None
    kv_dtype: str
    kv_bytes_per_token: int
    looplm_kv_bytes_per_token: int
    kv_capacity_tokens: int


class MeltEndpoint:
    """vLLM's `EndpointPlugin`. Loaded where `VLLM_PLUGINS` names `melt_serve`."""

    name = "melt_serve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/melt/info", tell, response_model=Info, response_model_exclude_none=True)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Gather the facts, once the engine knows its KV cache."""
        state.melt_info = None
        if engine_client is not None and isinstance(engine_client.vllm_config.model_config.hf_config, LoopLMConfig):
            state.melt_info = gather(engine_client.vllm_config)


async def tell(request: Request) -> Info:
    """What is served; a 404 where that is another model than ours."""
    info: Info | None = request.app.state.melt_info
    if info is None:
        raise HTTPException(404, "This server runs neither a MELT nor a LoopLM checkpoint.")
    return info


def gather(vllm_config: VllmConfig) -> Info:
    """The facts, from the engine's own configuration."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config: LoopLMConfig = model.hf_config
    kv_dtype = str(model.dtype).removeprefix("torch.") if cache.cache_dtype == "auto" else cache.cache_dtype
    own = kv_bytes_per_token(config, STR_DTYPE_TO_TORCH_DTYPE[kv_dtype].itemsize)
    assert cache.num_gpu_blocks is not None
    names = model.served_model_name
    info = Info(
        models=[names] if isinstance(names, str) else list(names),
        architecture=model.architecture,
        default_loops=config.total_ut_steps,
        max_loops=config.total_ut_steps,
        kv_dtype=kv_dtype,
        kv_bytes_per_token=own,
        looplm_kv_bytes_per_token=own,
        kv_capacity_tokens=cache.num_gpu_blocks * cache.block_size,
    )
    if isinstance(config, MeltConfig):
        assert config.max_loops is not None
        info.decode_mode, info.chunk_size, info.max_loops = config.decode_mode, config.chunk_size, config.max_loops
        info.effort_loops, info.exit_threshold = config.loops_by_effort, config.early_exit_threshold
        info.looplm_kv_bytes_per_token = own * config.total_ut_steps
    return info
