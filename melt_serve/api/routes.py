"""`/melt`, `/melt/info` and `/melt/ready`, and the guard before all routes, through vLLM's endpoint plugins."""

import base64
import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.async_llm import AsyncLLM

from melt_serve.api.errors import shorten
from melt_serve.api.guard import Guard, own_hosts
from melt_serve.api.health import Readiness, show_ready, step_timeout
from melt_serve.api.info import Info, lasting_facts, read_metrics
from melt_serve.api.limits import Limits
from melt_serve.config import LoopLMConfig
from melt_serve.engine import lifeline
from melt_serve.engine.patches import stop_quietly

PAGE = (Path(__file__).parent / "page.html").read_text()


class MeltEndpoint:
    """vLLM's `EndpointPlugin`, loaded where `VLLM_PLUGINS` names `melt_serve`."""

    name = "melt_serve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and put the guard before all: before vLLM's middlewares, which it adds later, too."""
        guard = make_guard(app.state.args)
        build_all = app.build_middleware_stack
        app.build_middleware_stack = lambda: guard(build_all())  # type: ignore[method-assign]
        app.add_api_route("/melt", show_page, response_class=HTMLResponse)
        app.add_api_route("/melt/ready", show_ready)
        app.add_api_route("/melt/info", show_info, response_model=Info, response_model_exclude_none=True)
        app.add_api_route("/v1/models/{name:path}", show_model)

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


def make_guard(args: Namespace) -> Callable[[ASGIApp], Guard]:
    """Return what puts a guard around an application, as vLLM's flags and our environment say."""
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    reachable = bool(keys) or args.uds is not None  # no browser reaches a Unix socket
    return partial(
        Guard,
        limits=Limits.from_environment(),
        keys=keys,
        hosts=frozenset() if reachable else own_hosts(args.host, os.environ.get("MELT_ALLOWED_HOSTS", "")),
        cors={
            "allow_origins": args.allowed_origins,
            "allow_credentials": args.allow_credentials,
            "allow_methods": args.allowed_methods,
            "allow_headers": args.allowed_headers,
        },
    )


async def show_model(name: str, request: Request) -> JSONResponse:
    """Answer with one of the models, or adapters, that `/v1/models` lists, or with a 404."""
    models = await request.app.state.openai_serving_models.show_available_models()
    for model in models.data:
        if model.id == name:
            return JSONResponse(model.model_dump())
    served = ", ".join(model.id for model in models.data)
    raise HTTPException(404, f"There is no model {shorten(name, 100)!r} here: {served}.")


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
