"""What deploy/verify_image.sh wants to see of a server that runs, asked as its users would.

python deploy/check_server.py http://127.0.0.1:8000 --key KEY --pid PID
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import psutil

QUESTION = (
    "Answer at once. Ann is in Rome. Gus is in Bern. Bob is with Ann. Hana is with Gus. "
    "Kim is with Bob. Jack is with Hana. Leo is in Oslo. Mia is with Leo. Where is Jack?"
)
START_SECONDS, STOP_SECONDS = 240, 40


def main() -> None:
    """Check one thing after the other; the first that fails ends it with a line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--key", required=True, help="the key the server was started with")
    parser.add_argument("--model", default="melt-demo")
    parser.add_argument("--pid", type=int, required=True, help="a process that the server runs under")
    parser.add_argument("--healthcheck", help="a command that must succeed while the server runs")
    options = parser.parse_args()
    try:
        server = wait(options.url, psutil.Process(options.pid))
        check("it runs without root's rights", server.uids().real != 0 and server.uids().effective != 0)
        client = openai.OpenAI(base_url=f"{options.url}/v1", api_key=options.key, max_retries=0)
        check("it refuses to answer without its key", refuses(options.url))
        answer = ask(client, options.model).choices[0].message.content or ""
        check("it answers", answer.strip() == "In Bern.", repr(answer))
        with urllib.request.urlopen(f"{options.url}/metrics", timeout=10) as metrics:
            check("it shows metrics", b"melt_kv_bytes_per_token" in metrics.read())
        if options.healthcheck:
            ran = subprocess.run(shlex.split(options.healthcheck), capture_output=True, text=True)
            check("its health check succeeds", ran.returncode == 0, ran.stderr)
        stop(server, client, options.model)
    except (AssertionError, psutil.Error, openai.OpenAIError, OSError) as error:
        sys.exit(f"FAILED: {error}")


def check(what: str, holds: bool, seen: str = "") -> None:
    """Print that it holds, or raise AssertionError with what was seen."""
    if not holds:
        raise AssertionError(f"{what}{seen and f', but: {seen}'}")
    print(f"ok: {what}", flush=True)


def wait(url: str, parent: psutil.Process) -> psutil.Process:
    """Wait until the server is ready; return the process that is told to stop: the parent of the one that listens.

    Raises:
        AssertionError: `parent` ended, or `START_SECONDS` are over.
    """
    started = time.monotonic()
    while time.monotonic() < started + START_SECONDS:
        if not parent.is_running() or parent.status() == psutil.STATUS_ZOMBIE:
            raise AssertionError("the server ended while it started")
        try:
            with urllib.request.urlopen(f"{url}/melt/ready", timeout=5):
                check(f"it is ready after {time.monotonic() - started:.0f} s", True)
                listening = listener(int(url.rpartition(":")[2]))
                return listening.parent() or listening
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"the server is not ready after {START_SECONDS} s")


def listener(port: int) -> psutil.Process:
    """Return the process of this machine that listens on a port; raise AssertionError if none does."""
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None:
            return psutil.Process(each.pid)
    raise AssertionError(f"nobody listens on port {port}")


def refuses(url: str) -> bool:
    """Return whether a route that spends compute, and that vLLM itself leaves open, asks for a key."""
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/tokenize", data=b"{}"), timeout=10)
    except urllib.error.HTTPError as error:
        return error.code == 401
    return False


def ask(client: openai.OpenAI, model: str) -> openai.types.chat.ChatCompletion:
    """Ask the bundled task's question, which takes four loops."""
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        extra_body={"vllm_xargs": {"loops": 4}},
    )


def stop(server: psutil.Process, client: openai.OpenAI, model: str) -> None:
    """Send SIGTERM while an answer is streamed; check that it comes whole and that the server ends in time."""
    stream = client.completions.create(
        model=model, prompt=QUESTION, stream=True, max_tokens=600, extra_body={"ignore_eos": True}
    )
    next(stream)
    told = time.monotonic()
    threading.Timer(0.1, os.kill, [server.pid, signal.SIGTERM]).start()
    *_, last = stream
    check("told to stop, it ends its answers", last.choices[0].finish_reason == "length")
    server.wait(STOP_SECONDS)
    check(f"it stops {time.monotonic() - told:.0f} s after it was told to", True)


if __name__ == "__main__":
    main()
