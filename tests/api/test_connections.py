"""What a client's connection may take, on vLLM's HTTP server, with an application that answers without a model."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from argparse import Namespace
from http.client import HTTPConnection

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from vllm.entrypoints.launchers.launcher import NoSignalServer

from melt_serve.api.guard import logger
from melt_serve.api.routes import MeltEndpoint

LIMITS = {
    "MELT_MAX_HEADER_BYTES": "4000",
    "MELT_HEADER_TIMEOUT": "1.5",
    "MELT_MAX_BODY_BYTES": "200000",
    "MELT_BODY_TIMEOUT": "0.7",
    "MELT_REQUEST_TIMEOUT": "2",
    "MELT_MAX_CONNECTIONS": "20",
}


class Stage:
    """An application on vLLM's HTTP server in a thread, set up as vLLM sets up its own."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        app = FastAPI()
        app.state.args = Namespace(
            api_key=None,
            host="127.0.0.1",
            uds=None,
            allowed_origins=["https://friend.example"],
            allow_credentials=False,
            allowed_methods=["*"],
            allowed_headers=["*"],
        )
        MeltEndpoint().attach_router(app)
        app.add_middleware(CORSMiddleware, allow_origins=["https://friend.example"])
        app.post("/echo")(self.echo)
        app.get("/stream")(self.stream)
        app.get("/large")(self.large)
        app.get("/slow")(self.slow)
        self.server = NoSignalServer(uvicorn.Config(app, log_level="warning", timeout_keep_alive=5))
        app.state.server = self.server
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))
        self.thread.start()
        until(lambda: self.server.started)

    async def echo(self, request: Request):
        return {"size": len(await request.body())}

    async def stream(self, size: int = 10, pause: float = 0.01):
        async def events():
            try:
                while True:
                    yield f"data: {'x' * size}\n\n"
                    await asyncio.sleep(pause)
            finally:
                self.ended.append("stream")

        return StreamingResponse(events(), media_type="text/event-stream")

    async def large(self):
        return "x" * 50_000_000

    async def slow(self):
        await asyncio.sleep(0.5)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, method, path, body=None, headers=()):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer, answer.read()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


def until(happens, seconds=10):
    """Wait until something is true, and return how long that took."""
    started = time.monotonic()
    while not happens():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


def everything(client):
    """All that the server says until it closes the connection."""
    said = b""
    try:
        while part := client.recv(65536):
            said += part
    except ConnectionResetError:
        pass  # it was closed while we sent; what had come before can be read
    return said


@pytest.fixture
def stage(monkeypatch):
    for name, value in LIMITS.items():
        monkeypatch.setenv(name, value)
    stage = Stage()
    yield stage
    if stage.thread.is_alive():
        stage.stop()


@pytest.fixture
def lines(caplog, monkeypatch):
    """The guard's lines in the log."""
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


def error(said: bytes):
    """The status and OpenAI's error of a whole answer."""
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_headers_without_end_are_refused(stage, lines):
    with stage.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 5000)
        status, told = error(everything(client))
    assert status == told["code"] == 431 and "4000 bytes" in told["message"]
    assert lines()[-1].startswith("127.0.0.1: no whole request, 431")
    answer, _ = stage.ask("GET", "/melt", headers={"X": "x" * 4000})  # whole, and too large
    assert answer.status == 431


def test_a_value_without_end_after_the_body_is_refused(stage, lines):
    with stage.connect() as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ")
        try:
            for _ in range(100):
                client.sendall(b"x" * 100_000)
        except OSError:
            pass
    until(lambda: any("no whole request, 413" in line for line in lines()))
    until(lambda: not stage.server.server_state.connections)


def test_connections_that_are_silent_or_drip_are_closed(stage, lines):
    def drips(client, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                client.sendall(b"X")
            except OSError:
                return
            time.sleep(0.1)

    silent, dripping, between = stage.connect(), stage.connect(), stage.connect()
    between.sendall(b"GET /melt HTTP/1.1\r\n\r\n")  # after its answer it never sends a whole next request
    dripping.sendall(b"GET / HTTP/1.1\r\n")
    for client in (dripping, between):
        threading.Thread(target=drips, args=(client, 5)).start()
    assert until(lambda: not stage.server.server_state.connections) < 5
    assert everything(silent) == b""
    status, told = error(everything(dripping))
    assert status == 408 and "1.5 s" in told["message"]
    assert any("no whole request, 408" in line for line in lines())


def test_there_are_only_so_many_connections(stage):
    crowd = [stage.connect() for _ in range(20)]
    until(lambda: len(stage.server.server_state.connections) == 20)
    with stage.connect() as one_more:
        status, told = error(everything(one_more))
    assert status == 503 and "too many open connections" in told["message"]
    for client in crowd:
        client.close()
    until(lambda: not stage.server.server_state.connections)
    assert stage.ask("POST", "/echo", b"12")[1] == b'{"size":2}'


def test_a_refused_body_closes_the_connection_when_the_client_could_read_why(stage):
    with stage.connect() as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 2_000_000)
        said = everything(client)
        assert error(said)[0] == 413 and b"connection: close" in said.lower()
    with stage.connect() as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nContent-Length: 30\r\n\r\nx")
        said = everything(client)
        assert error(said)[0] == 408 and b"connection: close" in said.lower()


def test_what_is_no_http_gets_an_error_in_openais_shape(stage):
    with stage.connect() as client:
        client.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert error(everything(client))[0] == 400


def test_a_stream_past_its_time_ends_with_an_error_and_without_an_end(stage, lines):
    with stage.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\n\r\n")
        said = everything(client)
    assert b'"code": 504' in said.rpartition(b"data: ")[2] and not said.endswith(b"0\r\n\r\n")
    until(lambda: stage.ended)
    until(lambda: lines())
    assert 2 <= float(re.search(r"GET '/stream' 200 in ([\d.]+)", lines()[0])[1]) < 6
    assert ", cut: The answer took longer than 2 s" in lines()[0]


@pytest.mark.parametrize("path", ["/stream?size=100000&pause=0", "/large"])
def test_an_answer_that_nobody_reads_is_given_up_a_second_after_its_time(stage, lines, path):
    with stage.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        until(lambda: stage.server.server_state.connections)
        assert until(lambda: not stage.server.server_state.connections) < 12
        until(lambda: lines())
        assert ", cut: " in lines()[0]


def test_a_client_that_leaves_is_told_apart(stage, lines):
    with stage.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\n\r\n")
        client.recv(100)
    until(lambda: lines())
    assert ", client gone, " in lines()[0] and stage.ended


@pytest.mark.parametrize("begun", ["POST /echo HTTP/1.1\r\nContent-Length: 9\r\n\r\nx", "GET /slow HTTP/1.1\r\n\r\n"])
def test_of_a_client_that_leaves_before_an_answer_no_status_is_logged(stage, lines, begun):
    with stage.connect() as client:
        client.sendall(begun.encode())
        until(lambda: stage.server.server_state.tasks)
    until(lambda: lines())
    method, path, _ = begun.split(" ", 2)
    assert f"{method} '{path}' - in " in lines()[0] and ", client gone, " in lines()[0]


def test_an_open_answer_ends_with_an_error_when_the_server_stops(stage, lines):
    with stage.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\n\r\n")
        client.recv(100)
        started = time.monotonic()
        stage.server.should_exit = True
        said = everything(client)
        stage.thread.join(10)
        assert not stage.thread.is_alive() and time.monotonic() - started < 5
    assert b"stopping" in said.rpartition(b"data: ")[2]
    assert ", cut: The server is stopping" in lines()[0]


def test_other_names_of_this_machine_are_refused(stage):
    for host in ("attacker.example", "attacker.example:80", "127.0.0.1.attacker.example", "1.2.3.4"):
        answer, body = stage.ask("GET", "/melt", headers={"Host": host})
        assert answer.status == 403 and "--allowed-hosts" in json.loads(body)["error"]["message"]
    for host in ("localhost", "LOCALHOST:8000", f"127.0.0.1:{stage.port}", "[::1]:8000"):
        assert stage.ask("GET", "/melt", headers={"Host": host})[0].status == 200


def test_unknown_routes_and_methods_have_openais_shape(stage):
    for method, path, status in [("GET", "/no/such", 404), ("POST", "/v1/none", 404), ("DELETE", "/echo", 405)]:
        answer, body = stage.ask(method, path)
        told = json.loads(body)["error"]
        assert answer.status == told["code"] == status and f"{method} {path}" in told["message"]
        assert answer.headers["X-Request-Id"] and {"message", "type", "param", "code"} <= told.keys()


def test_a_refusal_can_be_read_by_pages_that_may_ask(stage):
    for origin, allowed in [("https://friend.example", "https://friend.example"), ("https://foe.example", None)]:
        answer, _ = stage.ask("GET", "/melt", headers={"Host": "other", "Origin": origin})
        assert answer.status == 403 and answer.headers["Access-Control-Allow-Origin"] == allowed


def test_a_long_path_is_cut_in_the_log_and_in_the_answer(stage, lines):
    _, body = stage.ask("GET", "/" + "y" * 3500)
    assert len(body) < 2500
    until(lambda: lines())
    assert len(lines()[0]) < 600


OFFERS = {
    "HTTP/2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "WebSocket": b"Connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_offer_of_another_protocol_is_ignored_and_the_request_answered(stage, lines, offer, framing):
    """As Java's client makes one with the first request of every connection, in any pieces."""
    framed = b"Content-Length: 12\r\n\r\n" + 12 * b"x"
    if framing == "chunked":
        framed = b"Transfer-Encoding: chunked\r\n\r\n5\r\nxxxxx\r\n7\r\nxxxxxxx\r\n0\r\n\r\n"
    offering = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n" + OFFERS[offer] + framed
    plain = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n" + framed
    with stage.connect() as client:
        for request, size in ((offering, len(offering)), (plain, len(plain)), (offering, 7), (offering, 1)):
            for start in range(0, len(request), size):
                client.sendall(request[start : start + size])
            said = b""
            while not said.endswith(b"}"):
                said += client.recv(1000)
            assert said.startswith(b"HTTP/1.1 200 ") and said.endswith(b'\r\n\r\n{"size":12}'), said
    until(lambda: len(lines()) == 4)
    assert all("POST '/echo' 200 " in line for line in lines())


def test_a_websocket_is_checked_and_logged_like_any_request(stage, lines):
    offer = dict(line.split(": ") for line in OFFERS["WebSocket"].decode().splitlines())
    for host, status in (("attacker.example", 403), ("localhost", 404)):
        answer, body = stage.ask("GET", "/v1/realtime", headers={**offer, "Host": host})
        assert answer.status == json.loads(body)["error"]["code"] == status
        until(lambda code=status: any(f"GET '/v1/realtime' {code} " in line for line in lines()))


@pytest.mark.parametrize(("target", "status"), [("elsewhere.example:443", 400), ("/echo", 405)])
def test_a_tunnel_is_refused(stage, target, status):
    with stage.connect() as client:
        client.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nmore".encode())
        assert error(everything(client))[0] == status
