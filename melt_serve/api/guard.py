"""What stands between the network and every route: who may ask, how much, how long, and one line in the log."""

import asyncio
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from pydantic import BaseModel, PositiveFloat, PositiveInt
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger

logger = init_logger("vllm.melt_serve.guard")

OPEN = frozenset({"/health", "/ping", "/version", "/metrics", "/melt"})
"""Paths that need no key: they spend no compute and tell nothing of requests. All others do, vLLM's own among them
that it leaves open itself (`/invocations`, `/tokenize`, ...)."""

POLLED = frozenset({"/health", "/ping", "/metrics", "/melt/info"})
"""Paths that are asked for every few seconds: no line in the log."""

SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Limits(BaseModel):
    """What one request may take; each is set by the environment, `MELT_MAX_BODY_BYTES` and so on.

    Attributes:
        max_body_bytes: of a request's body; vLLM limits a prompt's tokens (`--max-model-len`), but reads it first.
        body_timeout: seconds until the whole body must have arrived.
        request_timeout: seconds until the whole answer must have gone out.
    """

    max_body_bytes: PositiveInt = 4 << 20
    body_timeout: PositiveFloat = 30
    request_timeout: PositiveFloat = 600

    @classmethod
    def from_environment(cls) -> "Limits":
        """Raises pydantic's ValidationError, which names the value that is no positive number."""
        names = {field: f"MELT_{field.upper()}" for field in cls.model_fields}
        return cls.model_validate({field: os.environ[name] for field, name in names.items() if name in os.environ})


@dataclass
class Refusal(Exception):
    """An answer instead of vLLM's."""

    status: HTTPStatus
    message: str


@dataclass
class Answer:
    """What has gone out to the client, and with which id."""

    send: Send
    request_id: str
    status: int | None = None
    streams: bool = False

    async def pass_on(self, message: Message) -> None:
        """To the client; the answer's head gets the request's id."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["X-Request-Id"] = self.request_id
            self.status = message["status"]
            self.streams = headers.get("content-type", "").startswith("text/event-stream")
        await self.send(message)


class Guard:
    """An ASGI middleware around all routes, vLLM's and ours.

    Args:
        keys: any of which opens the routes that are not in `OPEN`; without keys all are open.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], limits: Limits):
        self.app = app
        self.limits = limits
        self.keys = AuthenticationMiddleware(app, list(keys)) if keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with a 401, 408, 413 or 504 in OpenAI's shape."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, path = time.perf_counter(), scope["path"].removeprefix(scope.get("root_path", ""))
        answer = Answer(send, self.identify(scope))
        try:
            self.check_key(scope, path)
            body = await self.read(scope, receive)
            async with asyncio.timeout(self.limits.request_timeout):
                await self.app(scope, body, answer.pass_on)
        except Refusal as refusal:
            await refuse(scope, receive, answer, refusal.status, refusal.message)
        except TimeoutError:
            message = f"The answer took longer than {self.limits.request_timeout:g} s: ask for fewer tokens or loops."
            await refuse(scope, receive, answer, HTTPStatus.GATEWAY_TIMEOUT, message)
        finally:
            level = logger.debug if path in POLLED else logger.info
            who, seconds = (scope.get("client") or ["-"])[0], time.perf_counter() - started
            line = "%s %s %r %s in %.3f s, request %s"
            level(line, who, scope["method"], path, answer.status or "unanswered", seconds, answer.request_id)

    def identify(self, scope: Scope) -> str:
        """The client's X-Request-Id if it may stand in a log, or a new one; vLLM makes its own ids from it."""
        given = Headers(scope=scope).get("X-Request-Id", "")
        request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        MutableHeaders(scope=scope)["X-Request-Id"] = request_id
        return request_id

    def check_key(self, scope: Scope, path: str) -> None:
        """Raises Refusal."""
        if self.keys is None or path in OPEN or scope["method"] == "OPTIONS":
            return
        if not self.keys.verify_token(Headers(scope=scope)):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "This needs the server's API key: Authorization: Bearer KEY.")

    async def read(self, scope: Scope, receive: Receive) -> Receive:
        """Take in the whole body, and give it back in one piece. Raises Refusal where it is too much or too slow."""
        most, parts, size = self.limits.max_body_bytes, [], 0
        too_much = Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The request's body is larger than this server takes: {most} bytes."
        )
        said = Headers(scope=scope).get("Content-Length", "")
        if said.isdecimal() and int(said) > most:
            raise too_much
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_much
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            late = f"The request's body did not arrive within {self.limits.body_timeout:g} s."
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, late) from None
        whole: Message = {"type": "http.request", "body": b"".join(parts)}
        first = [whole if message["type"] == "http.request" else message]

        async def give() -> Message:
            return first.pop() if first else await receive()

        return give


async def refuse(scope: Scope, receive: Receive, answer: Answer, status: HTTPStatus, message: str) -> None:
    """Say why: as an answer, or as the last event of a stream that has begun."""
    error = create_error_response(message, err_type=status.phrase, status_code=status).model_dump()
    if answer.status is None:
        headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
        await JSONResponse(error, status, headers)(scope, receive, answer.pass_on)
    elif answer.streams:
        await answer.send({"type": "http.response.body", "body": f"data: {json.dumps(error)}\n\n".encode()})
