"""`melt-serve serve` with tight limits, and with all that is seldom on: what becomes of requests whose time is over."""

import json
import re
import signal
import sys
import time
import urllib.request
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import pytest

from melt_serve.server_process import free_port, running

LONG = {"model": "melt-demo", "prompt": "Find everybody.", "max_tokens": 1900, "ignore_eos": True}
"""About 20 seconds of work."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    words = ["--port", str(port), "--kv-cache-memory-bytes", str(64 << 20)]
    words += ["--request-timeout", "4", "--shutdown-timeout", "1", "--enable-lora", "--max-lora-rank", "8"]
    command = [sys.executable, "-m", "melt_serve.cli", "serve", *words]
    folder = tmp_path_factory.mktemp("limits")
    no_compiler = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    seldom = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1", **no_compiler}
    with running(command, port, folder / "log.txt", environment={"VLLM_LOGGING_LEVEL": "INFO", **seldom}) as server:
        yield server


def requests_running(server):
    """How many requests have rows just now."""
    with urllib.request.urlopen(f"{server.url}/melt/info") as answer:
        now = json.load(answer)["now"]
    return now["running"] + now["waiting"]


def rows_are_freed(server):
    end = time.monotonic() + 8  # what they ask for takes twice as long
    while requests_running(server):
        assert time.monotonic() < end, "requests run on when nobody waits for them"
        time.sleep(0.1)


def line_of(server, request_id):
    """The request's line in the log."""
    for _ in range(50):
        for line in server.log.read_text().splitlines():
            if line.endswith(f"request {request_id}"):
                return line
        time.sleep(0.1)
    raise AssertionError(f"no line for {request_id}")


def cut_stream(server, request_id, begun=lambda: None):
    """What a stream says until it breaks off, without an end: nobody takes it for whole."""
    ask = {**LONG, "stream": True}
    headers = {"X-Request-Id": request_id}
    said = b""
    with (
        httpx.stream("POST", f"{server.url}/v1/completions", json=ask, headers=headers, timeout=30) as stream,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        for part in stream.iter_bytes():
            if not said:
                begun()
            said += part
    return said


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_past_its_time_frees_its_rows(server, n):
    answer = httpx.post(
        f"{server.url}/v1/completions", json={**LONG, "n": n}, headers={"X-Request-Id": f"late-{n}"}, timeout=30
    )
    assert answer.status_code == 504 and "4 s" in answer.json()["error"]["message"]
    assert answer.headers["connection"] == "close"
    rows_are_freed(server)
    assert ", timed out: " in line_of(server, f"late-{n}")


def test_a_stream_past_its_time_ends_with_an_error_and_frees_its_rows(server):
    said = cut_stream(server, "cut-1")
    assert json.loads(said.strip().rpartition(b"data: ")[2])["error"]["code"] == 504
    rows_are_freed(server)
    line = line_of(server, "cut-1")
    assert ", cut: " in line and 4 <= float(re.search(r" 200 in ([\d.]+)", line)[1]) < 9


def test_the_log_says_how_each_request_ended(server):
    def ask(request_id, **body):
        headers = {"X-Request-Id": request_id}
        return httpx.post(f"{server.url}/v1/completions", json={**LONG, **body}, headers=headers, timeout=30)

    assert ask("short", max_tokens=2).status_code == 200
    assert ", served, " in line_of(server, "short")
    assert ask("wrong", temperature="x" * 100_000).status_code == 400
    assert ", refused: " in line_of(server, "wrong") and "temperature" in line_of(server, "wrong")
    assert len(ask("unknown", model="x" * 100_000).text) < 3000
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, headers={"X-Request-Id": "left"}, timeout=0.5)
    assert ", client gone, " in line_of(server, "left")
    rows_are_freed(server)
    assert max(map(len, server.log.read_text().splitlines())) < 5000


def test_an_idle_connection_is_kept_longer_than_clients_use_it(server):
    """httpx and Node give one up after 5 seconds, when vLLM would close it: whoever is last meets a closed one."""
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    for pause in (0, 6):
        time.sleep(pause)
        connection.request("GET", "/version")  # http.client would open another one only after an error
        first = connection.sock
        assert connection.getresponse().read()
        assert connection.sock is first


def test_so_many_answers_to_a_prompt_are_refused(server):
    answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "n": 129}, timeout=30)
    assert answer.status_code == 400 and "128" in answer.json()["error"]["message"]


def test_log_probabilities_need_no_compiler(server):
    """vLLM would have their ranks compiled at the first request for them, and the engine would end here."""
    answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 2, "logprobs": 2}, timeout=30)
    assert answer.status_code == 200 and len(answer.json()["choices"][0]["logprobs"]["tokens"]) == 2


def test_what_cannot_be_streamed_from_a_stored_answer_is_refused_before_a_stream_begins(server):
    asked = {"model": "melt-demo", "input": "Where is Ann?", "max_output_tokens": 4, "background": True}
    whole = f"{server.url}/v1/responses/{httpx.post(f'{server.url}/v1/responses', json=asked).json()['id']}"
    assert httpx.get(whole).json()["object"] == "response"
    begun = httpx.post(f"{server.url}/v1/responses", json={**asked, "stream": True}).text
    streamed = f"{server.url}/v1/responses/{re.search(r'resp_[0-9a-f]+', begun)[0]}"
    assert "response.completed" in httpx.get(f"{streamed}?stream=true&starting_after=0").text
    for wrong, names in ((f"{whole}?stream=true", "stream"), (f"{streamed}?stream=true&starting_after=-5", "start")):
        answer = httpx.get(wrong)
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(names)
    assert httpx.get(f"{server.url}/v1/responses/resp_unknown?stream=true").status_code == 404
    assert "Traceback" not in server.log.read_text()


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("fields", "says"), [({}, "lora_alpha"), ({**ADAPTER, "r": 64}, "64"), (ADAPTER, "contain"), (None, "directory")]
)
def test_an_adapter_that_cannot_be_loaded_is_the_mistake_of_who_names_it(server, tmp_path, fields, says):
    path = tmp_path / "adapter"
    if fields is None:
        path.touch()
    else:
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(fields))
    asked = {"lora_name": "mine", "lora_path": str(path)}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=asked, timeout=30)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/models/mine").status_code == 404
    assert httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 2}, timeout=30).status_code == 200


def test_open_answers_end_with_an_error_when_the_server_stops(server):
    """This one comes last: it stops the server."""
    said = cut_stream(server, "cut-2", begun=lambda: server.process.send_signal(signal.SIGTERM))
    assert "stopping" in json.loads(said.strip().rpartition(b"data: ")[2])["error"]["message"]
    started = time.monotonic()
    server.process.wait(30)
    assert time.monotonic() - started < 10
