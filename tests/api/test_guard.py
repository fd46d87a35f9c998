"""The guard before all routes, on an application without a model; on real servers in test_safety.py."""

import asyncio
import json
import logging
from argparse import Namespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from melt_serve.api.guard import OPEN, logger
from melt_serve.api.routes import MeltEndpoint

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture
def application(monkeypatch):
    """Builds an application with our routes and some more."""

    def build(keys=None, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        app, endpoint = FastAPI(), MeltEndpoint()
        app.state.args = Namespace(
            api_key=keys,
            host="0.0.0.0",
            uds=None,
            allowed_origins=[],
            allow_credentials=False,
            allowed_methods=["*"],
            allowed_headers=["*"],
        )
        endpoint.attach_router(app)
        asyncio.run(endpoint.init_state(None, app.state, app.state.args))

        @app.post("/echo")
        async def echo(request: Request):
            return {"size": len(await request.body()), "id": request.headers["X-Request-Id"]}

        @app.get("/health")
        async def health():
            return None

        @app.get("/slow")
        async def slow():
            await asyncio.sleep(60)

        @app.get("/stream")
        async def stream():
            async def events():
                yield "data: 1\n\n"
                await asyncio.sleep(60)

            return StreamingResponse(events(), media_type="text/event-stream")

        return app

    return build


def ask(app, messages, path="/echo", headers=()):
    """What goes out, for what comes in: pieces of a body, or seconds to wait."""
    incoming, sent = list(messages), []

    async def receive():
        while incoming and isinstance(incoming[0], float):
            await asyncio.sleep(incoming.pop(0))
        body = incoming.pop(0) if incoming else b""
        return {"type": "http.request", "body": body, "more_body": bool(incoming)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


def test_without_a_key_everybody_may_ask(application):
    client = TestClient(application())
    assert client.post("/echo", content=b"12").json()["size"] == 2
    assert client.get("/melt/info").status_code == 404  # there is no model


@pytest.mark.parametrize("environment", [False, True])
def test_with_keys_all_but_the_open_routes_ask_for_one(application, environment):
    app = application(VLLM_API_KEY="secret") if environment else application(["other", "secret"])
    client = TestClient(app)
    for path in ("/echo", "/melt/info", "/docs", "/no-such-route"):
        refused = client.post(path) if path == "/echo" else client.get(path)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert "API key" in refused.json()["error"]["message"]
    for wrong in ("Bearer wrong", "secret", "Bearer", ""):
        assert client.post("/echo", headers={"Authorization": wrong}).status_code == 401
    assert client.post("/echo", headers=KEY).status_code == 200
    assert client.get("/melt").status_code == 200
    assert all(client.get(path).status_code != 401 for path in OPEN)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(application):
    app = application(MELT_MAX_BODY_BYTES="1000")
    assert ask(app, [b"x" * 600, b"x" * 400])[1]["size"] == 1000
    status, answer = ask(app, [b"x" * 600, b"x" * 401, 1000.0])
    assert status == 413 and "1000 bytes" in answer["error"]["message"]
    status, _ = ask(app, [1000.0], headers=[(b"content-length", b"1001")])
    assert status == 413


def test_a_body_that_does_not_arrive_is_given_up(application):
    app = application(MELT_BODY_TIMEOUT="0.2")
    assert ask(app, [b"x", 0.1, b"x"])[1]["size"] == 2
    status, answer = ask(app, [b"x", 60.0, b"x"])
    assert status == 408 and "0.2 s" in answer["error"]["message"]


def test_an_answer_that_takes_too_long_ends_with_an_error(application):
    client = TestClient(application(MELT_REQUEST_TIMEOUT="0.3"))
    answer = client.get("/slow")
    assert answer.status_code == 504 and "0.3 s" in answer.json()["error"]["message"]
    first, last, end = client.get("/stream").text.split("\n\n")
    assert first == "data: 1" and json.loads(last.removeprefix("data: "))["error"]["code"] == 504 and end == ""


@pytest.mark.parametrize("limit", ["MELT_MAX_BODY_BYTES", "MELT_BODY_TIMEOUT", "MELT_REQUEST_TIMEOUT"])
@pytest.mark.parametrize("value", ["0", "-1", "much"])
def test_a_limit_that_is_no_positive_number_stops_the_start(application, limit, value):
    with pytest.raises(ValueError, match=limit.removeprefix("MELT_").lower()):
        application(**{limit: value})


def test_every_request_has_an_id_that_stands_in_the_log(application, caplog, monkeypatch):
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger.name)
    client = TestClient(application())
    given = client.post("/echo", headers={"X-Request-Id": "mine-1"})
    assert given.headers["X-Request-Id"] == given.json()["id"] == "mine-1"
    made = client.post("/echo", headers={"X-Request-Id": "two\\nlines"})
    assert made.headers["X-Request-Id"] == made.json()["id"] != "two\\nlines"
    client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "vllm.melt_serve.guard"]
    assert all(", served, " in line for line in lines)
    assert len(lines) == 2 and "POST '/echo' 200 in" in lines[0] and lines[0].endswith("request mine-1")
    assert lines[1].endswith(made.json()["id"])


def test_the_page_loads_nothing_from_elsewhere(application):
    page = TestClient(application()).get("/melt")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http://" not in page.text and "https://" not in page.text
