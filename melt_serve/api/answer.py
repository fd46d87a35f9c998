"""The answer to one request, on its way out: it knows what has been sent, and can be ended at any point."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from melt_serve.api.connections import Connection
from melt_serve.api.errors import error_body, in_openai_shape
from melt_serve.api.limits import LAST_SECOND, RETRY_SECONDS


@dataclass
class Refusal(Exception):
    """Ends a request with an error of ours, in place of vLLM's answer or as its last event.

    Attributes:
        end: how the log calls it.
        body_is_read: the client has nothing more to send.
    """

    status: HTTPStatus
    message: str
    end: str = "refused"
    body_is_read: bool = False


@dataclass
class Answer:
    """What goes out to the client.

    Attributes:
        send: ASGI's.
        connection: none under another server than vLLM's.
        status: once the head has gone out.
        streams: it is a stream of server-sent events.
        whole: the last part has gone out, while the client was there.
        closed: what the application still sends is dropped.
        error: OpenAI's fields, of an error that the application answered with.
    """

    scope: Scope
    send: Send
    request_id: str
    connection: Connection | None
    status: int | None = None
    streams: bool = False
    whole: bool = False
    closed: bool = False
    error: dict[str, Any] = field(default_factory=dict)
    head: Message | None = None
    body: bytearray = field(default_factory=bytearray)

    async def forward(self, message: Message) -> None:
        """Send a part of the application's answer, with the request's id in its head, and errors in OpenAI's shape."""
        if self.closed or (self.connection is not None and self.connection.lost.done()):
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["X-Request-Id"] = self.request_id
            self.status = message["status"]
            self.streams = headers.get("content-type", "").startswith("text/event-stream")
            if message["status"] >= 400 and not self.streams:
                self.head = message  # it waits until the whole error is there
                return
        elif self.head is not None:
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = await self.send_error_head(self.head)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.whole = True
        await self.send(message)

    async def send_error_head(self, head: Message) -> Message:
        """Send the head of an error that was held back, and return its body."""
        request = f"{self.scope['method']} {self.scope['path']}"
        body, self.error = in_openai_shape(head["status"], bytes(self.body), request)
        headers = MutableHeaders(raw=head["headers"])
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        await self.send(head)
        return {"type": "http.response.body", "body": body}

    async def refuse(self, refusal: Refusal, receive: Receive, cors: dict[str, Any]) -> None:
        """End the answer with an error: as a whole answer, as an event, or at least by closing the connection.

        A client may see that an answer was cut: its last chunk is missing.
        """
        self.closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECOND):
                if self.whole:
                    pass  # the client has yet to read it
                elif self.status is None or self.head is not None:
                    await self.send_refusal(refusal, receive, cors)
                elif self.streams:
                    event = b"data: " + error_body(refusal.status, refusal.message) + b"\n\n"
                    await self.send({"type": "http.response.body", "body": event, "more_body": True})
        if self.connection is not None:
            await self.connection.close()

    async def send_refusal(self, refusal: Refusal, receive: Receive, cors: dict[str, Any]) -> None:
        """Send the error, with vLLM's headers for pages of other servers, and read what the client still sends.

        Closed with bytes of the client's unread, a connection is reset, and the client might not see the error.
        """
        headers = {"Connection": "close", "X-Request-Id": self.request_id}
        if refusal.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_SECONDS)
        error = Response(error_body(refusal.status, refusal.message), refusal.status, headers, "application/json")
        self.status = refusal.status

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body" and not refusal.body_is_read:
                await self.send({**message, "more_body": True})
                message = {"type": "http.response.body"}
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_SECOND / 2):
                        while (await receive()).get("more_body"):
                            pass
            await self.send(message)

        await CORSMiddleware(error, **cors)(self.scope, receive, send)
