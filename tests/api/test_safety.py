"""`melt-serve serve` with a key and TLS: what strangers get, what the log says, how it stops."""

import json
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from openai import APIStatusError, AuthenticationError, OpenAI

from melt_serve.api.guard import OPEN
from melt_serve.server_process import free_port, running
from tests.certificates import self_signed
from tests.container import in_shared_memory_of, may_mount

KEY = "sesame"
SECRET = "marzipan"
"""A word of prompts, which the log must not show."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    words = ["--port", str(port), "--kv-cache-memory-bytes", str(64 << 20), "--max-body-bytes", "100000"]
    command = [sys.executable, "-m", "melt_serve.cli", "serve", *words]
    folder = tmp_path_factory.mktemp("safe")
    certificate, key = self_signed(folder)
    command += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    if may_mount():
        command = [*in_shared_memory_of("64m"), *command]
    environment = {"VLLM_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "INFO", "MELT_HEADER_TIMEOUT": "4"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(certificate))
        patched.setattr(urllib.request, "_opener", None)  # it may have been made before, of other certificates
        with running(command, port, folder / "log.txt", scheme="https", environment=environment) as server:
            yield server


def status(server, method, path, key=None):
    """The code that a request without a body, or an empty one, is answered with."""
    request = urllib.request.Request(server.url + path, method=method, data=b"{}" if method == "POST" else None)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def question(text, **more):
    return {"model": "melt-demo", "messages": [{"role": "user", "content": text}], **more}


@pytest.mark.skipif(not may_mount(), reason="no mount namespaces here")
def test_it_runs_in_as_little_shared_memory_as_docker_gives(server, client):
    """vLLM's queues alone would take 400 MiB."""
    mounts = Path(f"/proc/{server.process.pid}/mounts").read_text().splitlines()
    assert [line for line in mounts if " /dev/shm tmpfs " in line and "size=65536k" in line]
    assert client.chat.completions.create(**question("Where is Ann?", max_tokens=4)).usage.completion_tokens == 4


def test_it_listens_on_this_machine_only(server):
    (api,) = psutil.Process(server.process.pid).children()  # of the supervisor
    sockets = api.net_connections("inet")
    port = int(server.url.rpartition(":")[2])
    assert {each.laddr.ip for each in sockets if each.laddr.port == port} == {"127.0.0.1"}


def test_every_route_but_the_open_ones_asks_for_the_key(server):
    request = urllib.request.Request(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        paths = json.load(answer)["paths"]
    routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert {("POST", "/tokenize"), ("POST", "/invocations"), ("POST", "/v1/chat/completions")} <= set(routes)
    for method, path in [*routes, ("GET", "/docs"), ("GET", "/melt/info")]:
        if path not in OPEN:
            assert status(server, method, path) == 401, path
            assert status(server, method, path, key="wrong") == 401, path
    assert all(status(server, "GET", path) in (200, 405) for path in OPEN)
    assert status(server, "GET", "/melt/info", key=KEY) == 200


def test_the_client_is_told_what_is_wrong(server, client):
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(APIStatusError) as refused:
        client.chat.completions.create(**question("x" * 100_000))
    assert refused.value.status_code == 413 and "100000 bytes" in refused.value.message
    assert client.chat.completions.create(**question("Where is Ann?", max_tokens=3)).choices


def test_who_has_no_key_is_answered_and_logged_like_all(server):
    request = urllib.request.Request(f"{server.url}/v1/models", headers={"X-Request-Id": "stranger-1"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    error = json.load(refused.value)["error"]
    assert (
        error["code"] == 401 and "API key" in error["message"] and refused.value.headers["X-Request-Id"] == "stranger-1"
    )
    for _ in range(50):
        if "request stranger-1" in (log := server.log.read_text()):
            break
        time.sleep(0.1)
    (line,) = [line for line in log.splitlines() if line.endswith("request stranger-1")]
    assert "GET '/v1/models' 401" in line and ", refused: This needs the server's API key" in line


def test_an_answer_tells_what_the_prefix_cache_had_of_its_prompt(client):
    asked = question(
        "Find everybody. Ann is in Rome. Bob is with Ann. Cara is with Bob. Where is Cara?" * 3, max_tokens=2
    )
    client.chat.completions.create(**asked)
    assert client.chat.completions.create(**asked).usage.prompt_tokens_details.cached_tokens >= 32


def test_the_page_and_health_come_by_tls_and_without_it_nothing_does(server):
    with urllib.request.urlopen(f"{server.url}/melt") as page:
        assert b"<title>" in page.read() and "script-src" in page.headers["Content-Security-Policy"]
    for path in ("/health", "/melt/ready"):
        with urllib.request.urlopen(server.url + path) as answer:
            assert answer.status == 200
    with pytest.raises((OSError, HTTPException)):  # reset, or ended with an alert of TLS
        urllib.request.urlopen(server.url.replace("https", "http") + "/health", timeout=30)


def test_headers_are_bounded_in_bytes_and_time_behind_tls_too(server):
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    trusted = ssl.create_default_context()
    for sent, says in (
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * (33 << 10), b"HTTP/1.1 431 "),
        (b"GET /health HTTP/1.1\r\nX: ", b"HTTP/1.1 408 "),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
        (b"", b""),
    ):
        plain = socket.create_connection(address, timeout=30)
        with trusted.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(sent)
            answer = b"".join(iter(lambda: received(connection), b""))
        assert answer.startswith(says) and bool(answer) == bool(says), answer


def received(connection):
    """What comes next of an answer; nothing if the connection ends, however it does."""
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def test_no_other_web_page_may_ask(server):
    request = urllib.request.Request(f"{server.url}/health", headers={"Origin": "https://elsewhere.example"})
    with urllib.request.urlopen(request) as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_log_has_ids_and_no_prompts(server, client):
    ask = client.with_options(default_headers={"X-Request-Id": "call-17"}).chat.completions
    answer = ask.create(**question(f"Where is {SECRET}?", max_tokens=4, stop=[SECRET]))
    assert "call-17" in answer.id
    client.completions.create(model="melt-demo", prompt=SECRET, max_tokens=2, echo=True, logprobs=1)
    for wrong in ({"max_tokens": -1}, {"temperature": SECRET}, {"extra_body": {"vllm_xargs": {"loops": SECRET}}}):
        with pytest.raises(APIStatusError):
            client.chat.completions.create(**question(SECRET, **wrong))
    with pytest.raises(APIStatusError):
        client.chat.completions.create(**question(f"{SECRET} " * 10_000))  # longer than the model's context
    status(server, "POST", f"/{SECRET}", key=KEY)
    for _ in range(100):  # a request's line is written after its answer
        log = server.log.read_text()
        if f"'/{SECRET}' 404" in log:
            break
        time.sleep(0.1)
    assert "request call-17" in log and "'/v1/chat/completions' 400" in log
    shown = [line for line in log.splitlines() if SECRET in line]
    assert len(shown) == 1 and f"'/{SECRET}' 404" in shown[0]  # a path, which was no prompt
    assert "GET '/health'" not in log


def test_running_requests_end_before_it_stops(server, client):
    """This one comes last: it stops the server."""
    stream = client.chat.completions.create(
        **question(
            "Find everybody. Ann is in Rome. Where is Ann?",
            stream=True,
            max_tokens=600,
            extra_body={"ignore_eos": True},
        )
    )
    next(stream)
    threading.Timer(0.2, server.process.send_signal, [signal.SIGTERM]).start()
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0
