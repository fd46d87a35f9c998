"""A server under attack: one for each decode mode, with so little room that a crowd preempts."""

import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from melt_serve.bundled import MELT
from melt_serve.server_process import Server, free_port, running

MODES = ("token", "chunk")
MODEL = "melt-demo"
QUESTION = "Find everybody. Ann is in Rome. Bob is with Ann. Where is Bob?"
PATIENCE = 120
"""Seconds that a client waits for an answer before it leaves."""


@contextmanager
def serving(mode: str, log: Path) -> Iterator["Attacked"]:
    """Start a server on the bundled checkpoint, with all routes that vLLM has for clients."""
    port = free_port()
    flags = {
        "--model": str(MELT),
        "--served-model-name": MODEL,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--hf-overrides": json.dumps({"decode_mode": mode}),
        "--kv-cache-memory-bytes": str(2 << 20),
        "--max-model-len": "768",
        "--reasoning-parser": "qwen3",
        "--tool-call-parser": "hermes",
    }
    words = [word for flag in flags.items() for word in flag]
    switches = ["--enable-auto-tool-choice", "--enable-scale-out", "--enforce-eager"]
    command = [sys.executable, "-m", "melt_serve.cli", "serve", *words, *switches]
    environment = {"OMP_NUM_THREADS": "1"}
    with running(command, port, log, environment=environment, start_new_session=True) as server:
        yield Attacked(server)


@dataclass
class Attacked:
    """A running server, asked as a client would and watched from outside."""

    server: Server

    def connect(self) -> HTTPConnection:
        """Open a connection of its own."""
        address = urlsplit(self.server.url)
        return HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE)

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Return the status and the text of an answer; status 0 if there was none in time, and the client left."""
        connection = self.connect()
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            return 0, repr(error)
        finally:
            connection.close()

    def get(self, path: str) -> str:
        """Return the text of a page."""
        with urllib.request.urlopen(self.server.url + path, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def says(self) -> str:
        """Return a greedy answer, which must stay the same whatever else is asked."""
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 64}
        status, text = self.post("/v1/chat/completions", json.dumps(body).encode())
        assert status == 200, text
        message = json.loads(text)["choices"][0]["message"]
        return f"{message['reasoning']} -> {message['content']}"

    def now(self) -> dict[str, Any]:
        """Return what runs and what the cache holds."""
        return json.loads(self.get("/melt/info"))["now"]

    def memory(self) -> int:
        """Return the bytes that the API process has in memory."""
        (server,) = psutil.Process(self.server.process.pid).children()  # of the supervisor
        return server.memory_info().rss

    def tracebacks(self) -> int:
        """Return how many tracebacks the log has."""
        return self.server.log.read_text(errors="replace").count("Traceback (most recent call last)")
