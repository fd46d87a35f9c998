"""Right answers of a running server: counted by `melt-serve eval`, and by EleutherAI's lm-eval."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from melt_serve import cli
from melt_serve.bundled import MELT
from melt_serve.task.evaluate import heldout

QUESTIONS = 8
TWO_LOOPS = {"vllm_xargs": {"loops": 2}}
TASKS = Path(cli.__file__).parent / "task" / "lm_eval"


def right_answers(server: str, **depth: object) -> list[bool]:
    """Which questions the server answers right, asked one by one."""
    asked = []
    for question in heldout(QUESTIONS):
        messages = [{"role": "user", "content": question.prompt}]
        body = {"model": "melt-demo", "temperature": 0, "messages": messages, **depth}
        asked.append(
            question.check(json.load(post(f"{server}/v1/chat/completions", body))["choices"][0]["message"]["content"])
        )
    return asked


def post(url: str, body: dict):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


@pytest.fixture(scope="module")
def right(server) -> list[bool]:
    """With two loops, because then some answers are wrong."""
    answers = right_answers(server, **TWO_LOOPS)
    assert 0 < sum(answers) < QUESTIONS
    return answers


class Gate(BaseHTTPRequestHandler):
    """Passes on what comes with the key, to be answered with two loops; lists no models, as some endpoints do."""

    upstream = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(404, b'{"error": {"message": "no such route"}}')

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, b'{"error": {"message": "wrong key"}}')
        with post(self.upstream + self.path, {**json.loads(body), **TWO_LOOPS}) as response:
            return self.answer(response.status, response.read())

    def answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def gate(server):
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("GateTo", (Gate,), {"upstream": server}))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


def evaluated(capsys, *words: str) -> dict:
    assert cli.main(["eval", *words, "--questions", str(QUESTIONS), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    return row


def test_a_server_is_scored_by_its_answers(server, capsys):
    row = evaluated(capsys, "--server", f"{server}/v1")
    assert (row["checkpoint"], row["questions"]) == ("melt-demo", QUESTIONS)
    assert row["accuracy"] == pytest.approx(sum(right_answers(server)) / QUESTIONS)


def test_an_endpoint_with_a_key_that_lists_no_models_is_scored(gate, right, capsys, monkeypatch):
    words = ("--server", gate, "--model", "melt-demo")
    given = evaluated(capsys, *words, "--api-key", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert evaluated(capsys, *words) == given
    assert given["accuracy"] == pytest.approx(sum(right) / QUESTIONS)


def test_a_wrong_key_or_model_is_one_line(server, gate, capsys):
    for words, says in (
        (["--server", gate, "--model", "melt-demo", "--api-key", "wrong"], "wrong key"),
        (["--server", gate, "--api-key", "secret"], "404"),
        (["--server", f"{server}/v1", "--model", "nobody"], "nobody"),
    ):
        assert cli.main(["eval", *words, "--questions", "1"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("melt-serve: error:") and says in error


def lm_eval(folder: Path, *words: str) -> tuple[dict, list[dict]]:
    """The command of docs/training.md; its results and what it saw of each question."""
    command = [sys.executable, "-m", "lm_eval", "run", "--include_path", str(TASKS), *words, "--seed", "0"]
    output = ["--limit", str(QUESTIONS), "--output_path", str(folder), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    done = subprocess.run([*command, *output], capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,), (samples,) = folder.rglob("results_*.json"), folder.rglob("samples_*.jsonl")
    return json.loads(results.read_text())["results"], [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["local-chat-completions", "local-completions"])
def test_lm_eval_counts_the_same_right_answers(server, right, tmp_path, kind):
    """Chats are rendered by the server; completions by lm-eval, with the checkpoint's own tokenizer and template."""
    route, tokenizer = {
        "local-chat-completions": ("chat/completions", "tokenizer_backend=None"),
        "local-completions": ("completions", f"tokenizer={MELT}"),
    }[kind]
    model = f"model=melt-demo,base_url={server}/v1/{route},num_concurrent=4,{tokenizer}"
    results, samples = lm_eval(
        tmp_path,
        "--model",
        kind,
        "--model_args",
        model,
        "--tasks",
        "melt_who_is_where",
        "--apply_chat_template",
        "--gen_kwargs",
        json.dumps(TWO_LOOPS),
    )
    assert results["melt_who_is_where"]["exact_match,answer"] == pytest.approx(sum(right) / QUESTIONS)
    by_question = {sample["doc_id"]: bool(sample["exact_match"]) for sample in samples}
    assert [by_question[number] for number in range(QUESTIONS)] == right
