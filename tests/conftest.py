"""How many random examples a run tries (`pytest --hypothesis-profile=long` for many more), and one server for all.

It is vLLM's own, with no launcher of ours, on the bundled checkpoint.
"""

import sys

import pytest
from hypothesis import settings

from melt_serve.bundled import MELT
from melt_serve.server_process import free_port, running

settings.register_profile("default", max_examples=16, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=100, deadline=None, print_blob=True)
settings.load_profile("default")  # else Hypothesis takes one of its own where the variable CI is set, of 100 examples

SWITCHES = ("--enable-auto-tool-choice", "--enable-scale-out", "--enforce-eager")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    port = free_port()
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
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *SWITCHES]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running(command, port, log, environment={"VLLM_PLUGINS": "melt_serve"}) as server:
        yield server.url


@pytest.fixture
def client(server):
    from openai import OpenAI  # comes with vLLM, which most tests do without

    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
