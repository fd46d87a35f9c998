"""A client's connection: bounded in bytes and time before there is a request, and closed when its time is over."""

import asyncio
from http import HTTPStatus
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from vllm.logger import init_logger

from melt_serve.api.errors import error_body
from melt_serve.api.limits import LAST_SECOND, Limits

logger = init_logger("vllm.melt_serve.guard")


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which by itself waits for headers without any limit, and for readers without end.

    A request finds its connection in `scope["state"]["connection"]`.

    Attributes:
        lost: done once the connection is closed, by whomever.
        ending: done when the server stops and cannot wait for this connection's answer any longer.
    """

    parser: "Parser"

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self.parser = Parser(self)
        self.limits = limits
        self.lost: asyncio.Future[None] = self.loop.create_future()
        self.ending: asyncio.Future[None] = self.loop.create_future()
        self.received = 0
        """Bytes of the request that is arriving."""
        self.late: asyncio.TimerHandle | None = None
        """Set while headers are awaited."""
        self.refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, unless there are too many."""
        super().connection_made(transport)
        self.await_head()
        if len(self.connections) > self.limits.max_connections:
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, "This server has too many open connections: try again later.")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits for it that the connection is closed."""
        super().connection_lost(exc)
        self.head_is_here()
        self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Read on, and refuse what is larger than a request may be."""
        if self.refused:
            return
        if not self.answering:
            self.await_head()
        super().data_received(data)
        self.received += len(data)
        if self.late and self.received > self.limits.max_header_bytes:
            self.refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"The request's headers are larger than this server takes: {self.limits.max_header_bytes} bytes.",
            )
        elif self.received > self.limits.max_request_bytes:
            self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request has no end.")

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self.received = 0
        self.await_head()

    def on_headers_complete(self) -> None:
        """Hand the request over to the application; one that offers another protocol comes again, see `Parser`."""
        if not self.parser.offers_protocol():
            self.head_is_here()
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the request's body."""
        if not self.parser.offers_protocol():
            super().on_message_complete()

    def head_without_upgrade(self) -> bytes:
        """Return the head that was just parsed, without its offer of another protocol."""
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *fields, b"", b""])

    def await_head(self) -> None:
        """Give the client its time to send headers, if that time does not run yet."""
        self.late = self.late or self.loop.call_later(self.limits.header_timeout, self.refuse_late_head)

    def head_is_here(self) -> None:
        """Stop that clock."""
        if self.late:
            self.late.cancel()
            self.late = None

    def refuse_late_head(self) -> None:
        """End a connection that does not send a whole request's head; a silent one without a word."""
        if self.received:
            late = f"The request's headers did not arrive within {self.limits.header_timeout:g} s."
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, late)
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self.refuse(HTTPStatus.BAD_REQUEST, msg)

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer what is no request yet with an error, and close the connection when the client could read it."""
        if self.refused:
            return
        self.refused = True
        self.head_is_here()
        logger.info("%s: no whole request, %d: %s", self.client[0] if self.client else "-", status, message)
        if self.answering:  # another request of this connection: an error would be read as a part of its answer
            self.transport.close()
        else:
            body = error_body(status, message)
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        # Closed at once, with bytes of the client's unread, it would be reset and the client might not see the answer.
        self.loop.call_later(LAST_SECOND, self.transport.abort)

    def shutdown(self) -> None:
        """Close the connection if it is idle; if not, its answer has a second to end by itself."""
        super().shutdown()
        self.loop.call_later(LAST_SECOND, self.end if self.answering else self.transport.abort)

    def end(self) -> None:
        """Let the answer be cut."""
        if not self.ending.done():
            self.ending.set_result(None)

    async def drained(self) -> None:
        """Wait until the client has taken all that was sent; uvicorn is content with all but 64 KiB."""
        if not self.lost.done():
            self.transport.set_write_buffer_limits(high=1, low=0)  # at 0, TLS would wait for what is not there
            await self.flow.drain()
        if not self.lost.done():
            self.transport.set_write_buffer_limits()

    async def close(self) -> None:
        """Close the connection: politely, and after a second by force."""
        self.transport.close()
        await asyncio.wait({self.lost}, timeout=LAST_SECOND)
        self.transport.abort()


class Parser(HttpRequestParser):
    """An HTTP parser for requests that offer another protocol, which a server may ignore (RFC 9110, 7.8).

    By itself it takes what follows such a head for the other protocol's, and the request's body is lost. Java's client
    offers HTTP/2 with every first request. WebSockets are another one: no looped model has a route for them.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.connection = connection

    def offers_protocol(self) -> bool:
        """Return whether the request that is being parsed offers another protocol; CONNECT demands a tunnel."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """Parse what has come, and a head that offers another protocol once more, without its offer."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as offer:
            if not self.offers_protocol():
                raise
            self.feed_data(self.connection.head_without_upgrade() + data[offer.args[0] :])
