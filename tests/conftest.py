"""How many random examples a run tries (`pytest --hypothesis-profile=long` for many more), and one server for all.

It is vLLM's own, with no launcher of ours, on the bundled checkpoint.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from hypothesis import settings
from openai import OpenAI

from melt_serve.bundled import MELT

settings.register_profile("default", max_examples=8, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=100, deadline=None, print_blob=True)

SWITCHES = ("--enable-auto-tool-choice", "--enforce-eager")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = {
        "--model": str(MELT),
        "--served-model-name": "melt-demo",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--kv-cache-memory-bytes": str(64 << 20),
        "--max-model-len": "768",
        "--reasoning-parser": "qwen3",
        "--tool-call-parser": "hermes",
        "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }
    words = [word for flag in flags.items() for word in flag]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *SWITCHES],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_PLUGINS": "melt_serve"},
        )
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-4000:]
                if healthy(url):
                    break
                time.sleep(1)
            else:
                raise AssertionError(log.read_text()[-4000:])
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture
def client(server):
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
