"""The guard before everything that vLLM's server does: it checks hosts and keys, limits requests, and logs each."""

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger

from melt_serve.api.answer import Answer, Refusal
from melt_serve.api.bodies import find_mistake
from melt_serve.api.connections import Connection
from melt_serve.api.errors import shorten
from melt_serve.api.health import ALWAYS_ANSWERED, is_closing
from melt_serve.api.limits import LAST_SECOND, Limits

logger = init_logger("vllm.melt_serve.guard")

OPEN = frozenset({"/health", "/ping", "/version", "/metrics", "/melt", "/melt/ready"})
"""Paths that need no key: they spend no compute and show nothing of requests. All others do, also those that vLLM
itself leaves open (`/invocations`, `/tokenize`, ...)."""

POLLED = frozenset({"/health", "/ping", "/metrics", "/melt/info", "/melt/ready"})
"""Paths that are polled every few seconds, and so are logged only if something is wrong."""

AT_ONCE = 1 << 16
"""Bytes of a body that is looked through at once."""

SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

LONGEST_PATH = 200
"""Characters of a path in the log."""


class Guard:
    """An ASGI application around vLLM's, outside of all its middlewares.

    Args:
        keys: any of which opens the routes that are not in `OPEN`; without keys all are open.
        hosts: names that a request may call this server by; empty for any.
        cors: what pages of other servers may do, in the words of Starlette's `CORSMiddleware`.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Sequence[str], hosts: frozenset[str], cors: dict[str, Any]
    ) -> None:
        self.app = app
        self.limits = limits
        self.keys = AuthenticationMiddleware(app, list(keys)) if keys else None
        self.hosts = hosts
        self.cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error in OpenAI's shape."""
        if scope["type"] == "lifespan":
            self.watch_connections(scope["app"].state)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        answer = Answer(scope, send, self.identify(scope), scope.get("state", {}).pop("connection", None))
        end = "failed"
        app: asyncio.Task[None] | None = None
        try:
            self.check(scope)
            if (body := await self.read(scope, receive)) is not None:
                app = asyncio.create_task(self.run(answer, body))
                await self.wait(app, answer)
            end = how_it_ended(answer)
        except Refusal as refusal:
            end = f"{refusal.end}: {refusal.message}"
            await answer.refuse(refusal, receive, self.cors)
        finally:
            log(answer, end, time.perf_counter() - started)
            if app is not None and not app.done():
                await end_soon(app)

    def watch_connections(self, state: Any) -> None:
        """Let uvicorn, which is about to listen, bound its connections as we do."""
        if hasattr(state, "server"):
            state.server.config.http_protocol_class = partial(Connection, self.limits)

    def identify(self, scope: Scope) -> str:
        """Return the client's X-Request-Id if it is safe to log, or a new one. vLLM makes its own from it."""
        given = Headers(scope=scope).get("X-Request-Id", "")
        request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        MutableHeaders(scope=scope)["X-Request-Id"] = request_id
        return request_id

    def check(self, scope: Scope) -> None:
        """Raise Refusal unless the headers are short, name this server, and hold a key of ours where one is needed.

        A server that is told to stop refuses all that needs its engine.
        """
        headers = Headers(scope=scope)
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.limits.max_header_bytes:
            most = f"The request's headers are larger than this server takes: {self.limits.max_header_bytes} bytes."
            raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, most)
        host = without_port(headers.get("Host", ""))
        if self.hosts and host and host not in self.hosts:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"This server is not {shorten(host, LONGEST_PATH)!r}: without a key it answers to its own names only "
                "(--allowed-hosts adds some).",
            )
        needs_key = self.keys is not None and path_of(scope) not in OPEN and scope["method"] != "OPTIONS"
        if self.keys is not None and needs_key and not self.keys.verify_token(headers):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "This needs the server's API key: Authorization: Bearer KEY.")
        if path_of(scope) not in ALWAYS_ANSWERED and is_closing(scope["app"].state):
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "The server is stopping.")

    async def read(self, scope: Scope, receive: Receive) -> Receive | None:
        """Read the whole body, and return a `receive` that gives it in one piece; None if the client left before.

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
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_much
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            late = f"The request's body did not arrive within {self.limits.body_timeout:g} s."
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, late, end="timed out") from None
        whole: Message = {"type": "http.request", "body": b"".join(parts)}
        # A large body takes seconds, in which all other clients would wait.
        look = partial(find_mistake, scope, whole["body"], self.limits.max_items)
        mistake = await asyncio.to_thread(look) if size > AT_ONCE else look()
        if mistake is not None:
            raise Refusal(HTTPStatus.BAD_REQUEST, mistake)
        first = [whole]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    async def wait(self, app: asyncio.Task[None], answer: Answer) -> None:
        """Wait until the application has answered, and the client has its answer.

        Raises:
            Refusal: it takes too long, or the server stops.
        """
        ending = answer.connection.ending if answer.connection else asyncio.Future()
        await asyncio.wait({app, ending}, timeout=self.limits.request_timeout, return_when=asyncio.FIRST_COMPLETED)
        if app.done():
            return app.result()
        end = "timed out" if answer.status is None else "cut"
        if ending.done():
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "The server is stopping.", end, body_is_read=True)
        limit = f"{self.limits.request_timeout:g} s"
        message = f"The answer took longer than {limit}: ask for fewer tokens or loops."
        if answer.whole:
            message = f"The client did not take its answer within {limit}."
        raise Refusal(HTTPStatus.GATEWAY_TIMEOUT, message, end, body_is_read=True)

    async def run(self, answer: Answer, receive: Receive) -> None:
        """Let the application answer, and wait until the client has taken all of it."""
        await self.app(answer.scope, receive, answer.forward)
        if answer.connection is not None:
            await answer.connection.drained()


async def end_soon(app: asyncio.Task[None]) -> None:
    """End an application whose client is told that there is no answer.

    vLLM's routes end, and free their rows, when they hear that the client has left. Cancelled, they would run on.
    """
    await asyncio.wait({app}, timeout=LAST_SECOND)
    app.cancel()
    await asyncio.gather(app, return_exceptions=True)


def how_it_ended(answer: Answer) -> str:
    """Return how an answer of the application's ended, without a word of the client's content."""
    if not answer.whole:
        return "client gone"
    assert answer.status is not None
    if answer.status < 400:
        return "served"
    end = "refused" if answer.status < 500 else "failed"
    why = [str(answer.error[name]) for name in ("type", "param") if answer.error.get(name)]
    return f"{end}: {shorten(', '.join(why), LONGEST_PATH)!r}" if why else end


def log(answer: Answer, end: str, seconds: float) -> None:
    """Write the request's line."""
    path = path_of(answer.scope)
    who = (answer.scope.get("client") or ["-"])[0]
    level = logging.DEBUG if path in POLLED and end == "served" else logging.INFO
    line = "%s %s %r %s in %.3f s, %s, request %s"
    shown = shorten(path, LONGEST_PATH)
    logger.log(level, line, who, answer.scope["method"], shown, answer.status or "-", seconds, end, answer.request_id)


def path_of(scope: Scope) -> str:
    """Return the path of a request, as routes are named."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def own_hosts(bound: str | None, more: str) -> frozenset[str]:
    """Return the names that a server without a key may be called by: empty, for all, unless it is bound to loopback.

    A page of a browser on this machine could else ask it under a name of its own that leads here (DNS rebinding).

    Args:
        bound: the address that the server listens on.
        more: other names, with commas between them; `*` for all.
    """
    names = {name.strip().lower() for name in more.split(",") if name.strip()}
    if "*" in names or not is_loopback(bound):
        return frozenset()
    return frozenset({"localhost", "127.0.0.1", "[::1]", without_port(bound or "")} | names)


def is_loopback(host: str | None) -> bool:
    """Return whether only this machine can reach a server that is bound to this address."""
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:
        return host == "localhost"


def without_port(host: str) -> str:
    """Return the name in a Host header: `Localhost:8000` is `localhost`, `[::1]:8000` is `[::1]`."""
    if host.count(":") > 1 and not host.startswith("["):
        return f"[{host.lower()}]"
    return re.sub(r":\d*$", "", host).rstrip(".").lower()
