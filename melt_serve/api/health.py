"""`/melt/ready`: whether a request sent now would be answered. `/health`, vLLM's, only says that the process lives."""

import os
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import Request
from pydantic import PositiveFloat, TypeAdapter
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.async_llm import AsyncLLM

from melt_serve.api.limits import RETRY_SECONDS
from melt_serve.api.metrics import steps_ended
from melt_serve.engine.patches import is_stopping

STEP_TIMEOUT = "MELT_STEP_TIMEOUT"

ALWAYS_ANSWERED = frozenset({"/health", "/ping", "/version", "/metrics", "/melt", "/melt/info", "/melt/ready"})
"""Paths that need no engine, and that are of use while the server stops."""


@dataclass
class Readiness:
    """What a server's probes have seen of its steps.

    Attributes:
        engine: vLLM's.
        step_timeout: seconds without a step, while there are requests, after which it counts as stuck.
        steps: of all engines, when it was last asked.
        since: when they were last seen to change, or nobody waited.
        waited: there were requests when it was last asked.
    """

    engine: AsyncLLM
    step_timeout: float
    steps: float = -1
    since: float = field(default_factory=time.monotonic)
    waited: bool = False

    def refusal(self) -> str | None:
        """Return why a new request would not be answered; None if it would."""
        if self.engine.errored and not is_stopping(self.engine):
            return "The engine has ended."
        if is_stopping(self.engine):
            return "The server is stopping."
        steps, now = steps_ended(), time.monotonic()
        waiting = self.engine.get_num_unfinished_requests() > 0
        if steps != self.steps or not (waiting and self.waited):
            self.steps, self.since = steps, now
        self.waited = waiting
        if now - self.since > self.step_timeout:
            return f"No step has ended for {now - self.since:.0f} s, and requests wait."
        return None


def step_timeout() -> float:
    """Return the seconds of `MELT_STEP_TIMEOUT`, 60 by default: a step takes less, even of a long prompt on a CPU.

    Raises:
        ValidationError: pydantic's; it is no positive number.
    """
    return TypeAdapter(PositiveFloat).validate_python(os.environ.get(STEP_TIMEOUT, "60"))


async def show_ready(request: Request) -> JSONResponse:
    """Answer with a 200, or with a 503 that says why requests should go elsewhere."""
    readiness: Readiness | None = request.app.state.melt_readiness
    refusal = None if readiness is None else readiness.refusal()
    return JSONResponse({"ready": True}) if refusal is None else unavailable(refusal)


def is_closing(state: Any) -> bool:
    """Return whether the server of this application's state has been told to stop."""
    readiness: Readiness | None = getattr(state, "melt_readiness", None)
    return readiness is not None and is_stopping(readiness.engine)


def unavailable(why: str) -> JSONResponse:
    """Make a 503 in OpenAI's shape."""
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = create_error_response(why, err_type=status.phrase, status_code=status).model_dump()
    return JSONResponse(error, status, {"Retry-After": str(RETRY_SECONDS), "Connection": "close"})
