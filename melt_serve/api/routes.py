"""`/melt`, `/melt/info` and `/melt/ready`, and the guard before all routes, through vLLM's endpoint plugins."""

import base64
import hashlib
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.async_llm import AsyncLLM

from melt_serve.api.guard import Guard, Limits
from melt_serve.api.health import Closing, Readiness, show_ready, step_timeout
from melt_serve.api.info import Info, lasting_facts, read_metrics
from melt_serve.config import LoopLMConfig
from melt_serve.engine import lifeline
from melt_serve.engine.patches import stop_quietly

PAGE = (Path(__file__).parent / "page.html").read_text()


class MeltEndpoint:
    """vLLM's `EndpointPlugin`, loaded where `VLLM_PLUGINS` names `melt_serve`."""

    name = "melt_serve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and put the guard before all."""
        keys = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
        app.add_middleware(Closing)
        app.add_middleware(Guard, keys=keys, limits=Limits.from_environment())
        app.add_api_route("/melt", show_page, response_class=HTMLResponse)
        app.add_api_route("/melt/ready", show_ready)
        app.add_api_route("/melt/info", show_info, response_model=Info, response_model_exclude_none=True)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Collect the facts, once the engine knows its KV cache."""
        state.melt_info = None
        if engine_client is not None and isinstance(engine_client.vllm_config.model_config.hf_config, LoopLMConfig):
            state.melt_info = lasting_facts(engine_client.vllm_config)
        state.melt_readiness = None
        if isinstance(engine_client, AsyncLLM):
            stop_quietly()
            state.melt_readiness = Readiness(engine_client, step_timeout())
        if engine_client is not None:
            lifeline.tell_ready(engine_client.vllm_config.shutdown_timeout)


async def show_page() -> HTMLResponse:
    """Answer with the page; it may run its own script and talk to this server, and nothing else."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})


async def show_info(request: Request) -> Info:
    """Answer with what is served and what is going on, or a 404 if that is another model than ours."""
    info: Info | None = request.app.state.melt_info
    if info is None:
        raise HTTPException(404, "This server runs neither a MELT nor a LoopLM checkpoint.")
    return info.model_copy(update={"now": read_metrics(info)})


def csp_source(tag: str) -> str:
    """Name the page's own script or style as a Content-Security-Policy does: by its SHA-256."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {csp_source('script')}; style-src {csp_source('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
