"""The guard between the network and every route: it checks keys, limits requests and logs each in one line."""

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

from melt_serve.api.bodies import find_mistake

logger = init_logger("vllm.melt_serve.guard")

OPEN = frozenset({"/health", "/ping", "/version", "/metrics", "/melt", "/melt/ready"})
"""Paths that need no key: they spend no compute and show nothing of requests. All others do, also those that vLLM
itself leaves open (`/invocations`, `/tokenize`, ...)."""

POLLED = frozenset({"/health", "/ping", "/metrics", "/melt/info", "/melt/ready"})
"""Paths that are polled every few seconds, and so are not logged."""

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
        """Read the limits that are set; the others keep their defaults.

        Raises:
            ValidationError: pydantic's, which names the value that is no positive number.
        """
        names = {field: f"MELT_{field.upper()}" for field in cls.model_fields}
        return cls.model_validate({field: os.environ[name] for field, name in names.items() if name in os.environ})


@dataclass
class Refusal(Exception):
    """Ends a request with an answer of ours, in place of vLLM's."""

    status: HTTPStatus
    message: str


@dataclass
class Answer:
    """Sends an answer to the client, and knows what has gone out.

    Attributes:
        send: ASGI's.
        status: once the head has gone out.
        streams: it is a stream of server-sent events.
    """

    send: Send
    request_id: str
    status: int | None = None
    streams: bool = False

    async def forward(self, message: Message) -> None:
        """Send a part of the answer to the client, with the request's id in its head."""
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
        started = time.perf_counter()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        answer = Answer(send, self.identify(scope))
        try:
            self.check_key(scope, path)
            body = await self.read(scope, receive)
            async with asyncio.timeout(self.limits.request_timeout):
                await self.app(scope, body, answer.forward)
        except Refusal as refusal:
            await refuse(scope, receive, answer, refusal.status, refusal.message)
        except TimeoutError:
            message = f"The answer took longer than {self.limits.request_timeout:g} s: ask for fewer tokens or loops."
            await refuse(scope, receive, answer, HTTPStatus.GATEWAY_TIMEOUT, message)
        finally:
            level = logger.debug if path in POLLED else logger.info
            who = (scope.get("client") or ["-"])[0]
            seconds = time.perf_counter() - started
            line = "%s %s %r %s in %.3f s, request %s"
            level(line, who, scope["method"], path, answer.status or "unanswered", seconds, answer.request_id)

    def identify(self, scope: Scope) -> str:
        """Return the client's X-Request-Id if it is safe to log, or a new one. vLLM makes its own from it."""
        given = Headers(scope=scope).get("X-Request-Id", "")
        request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        MutableHeaders(scope=scope)["X-Request-Id"] = request_id
        return request_id

    def check_key(self, scope: Scope, path: str) -> None:
        """Raise Refusal if the path needs a key and the request has none of ours."""
        if self.keys is None or path in OPEN or scope["method"] == "OPTIONS":
            return
        if not self.keys.verify_token(Headers(scope=scope)):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "This needs the server's API key: Authorization: Bearer KEY.")

    async def read(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, and return a `receive` that gives it in one piece.

        Raises:
            Refusal: it is too large or too slow.
        """
        most = self.limits.max_body_bytes
        parts: list[bytes] = []
        size = 0
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
        if (mistake := find_mistake(scope, whole["body"])) is not None:
            raise Refusal(HTTPStatus.BAD_REQUEST, mistake)
        first = [whole if message["type"] == "http.request" else message]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay


async def refuse(scope: Scope, receive: Receive, answer: Answer, status: HTTPStatus, message: str) -> None:
    """Send the error as an answer, or as the last event of a stream that has begun."""
    error = create_error_response(message, err_type=status.phrase, status_code=status).model_dump()
    if answer.status is None:
        headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
        await JSONResponse(error, status, headers)(scope, receive, answer.forward)
    elif answer.streams:
        await answer.send({"type": "http.response.body", "body": f"data: {json.dumps(error)}\n\n".encode()})
