"""What comes through LiteLLM's proxy in front of a melt-serve server, asked as the gateway's clients would.

    python -m venv gateway && gateway/bin/pip install 'litellm[proxy]==1.100.5'
    python deploy/check_gateway.py --gateway gateway/bin/litellm

The gateway reads litellm.yaml, the file beside this one.
"""

import argparse
import json
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from melt_serve.bundled import MELT
from melt_serve.server_process import ServerError, free_port, running

CONFIG = Path(__file__).with_name("litellm.yaml")
SERVERS_KEY, GATEWAYS_KEY = "of-the-server", "sk-of-the-gateway"
QUESTION = (
    "Find everybody. Ann is in Rome. Gus is in Bern. Bob is with Ann. Hana is with Gus. "
    "Kim is with Bob. Jack is with Hana. Leo is in Oslo. Mia is with Leo. Where is Jack?"
)
THOUGHT, ANSWER = "Follow Jack Hana Gus Bern", "In Bern."
PEOPLE = ("Ann", "Jack")
WHO = {"type": "object", "properties": {"who": {"enum": PEOPLE}}, "required": ["who"], "additionalProperties": False}
LOCATE = {"type": "function", "function": {"name": "locate", "parameters": WHO, "strict": True}}


def main() -> None:
    """Check one thing after the other; the first that fails ends it with a line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gateway", default="litellm", help="the gateway's program")
    options = parser.parse_args()
    if shutil.which(options.gateway) is None:
        sys.exit(f"there is no {options.gateway}: pip install 'litellm[proxy]', or name it with --gateway")
    try:
        with tempfile.TemporaryDirectory() as folder, served(options.gateway, Path(folder)) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=GATEWAYS_KEY, max_retries=0)
            for each in (depth, reasoning, streams, tools, told, errors, other_routes):
                each(client)
            anthropic(url)
    except (AssertionError, ServerError, openai.OpenAIError, OSError, ValueError) as error:
        sys.exit(f"FAILED: {error}")


@contextmanager
def served(gateway: str, folder: Path) -> Iterator[str]:
    """Start a server with a key and the gateway in front of it, and yield the gateway's address."""
    port, front = free_port(), free_port()
    words = [sys.executable, "-m", "melt_serve.cli", "serve", "--port", str(port), "--max-model-len", "1024"]
    with running(
        words, port, folder / "server.txt", ready="/melt/ready", environment={"VLLM_API_KEY": SERVERS_KEY}
    ) as server:
        environment = {
            "MELT_URL": f"{server.url}/v1",
            "VLLM_API_KEY": SERVERS_KEY,
            "LITELLM_MASTER_KEY": GATEWAYS_KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the network for prices
            "PYTHONPATH": "",
        }
        words = [gateway, "--config", str(CONFIG), "--host", "127.0.0.1", "--port", str(front), "--telemetry", "False"]
        with running(
            words, front, folder / "gateway.txt", ready="/health/liveliness", environment=environment
        ) as proxy:
            yield proxy.url


def check(what: str, holds: bool, seen: object = "") -> None:
    """Print that it holds, or raise AssertionError with what was seen."""
    if not holds:
        raise AssertionError(f"{what}, but: {seen}")
    print(f"ok: {what}", flush=True)


def tell(what: str, comes: bool) -> None:
    """Print whether something comes through that may as well be dropped."""
    print(f"{'comes through' if comes else 'dropped'}: {what}", flush=True)


def ask(client: openai.OpenAI, **arguments: Any) -> Any:
    """Ask the question at temperature 0, and return the completion or its stream."""
    messages = arguments.pop("messages", [{"role": "user", "content": QUESTION}])
    return client.chat.completions.create(model=MELT.name, messages=messages, temperature=0, **arguments)


def loops(answer: Any) -> Any:
    """Return an answer's `usage.loops`, or None where the gateway left it out."""
    return getattr(answer.usage, "loops", None)


def depth(client: openai.OpenAI) -> None:
    """Check that efforts, loops and exit thresholds arrive, and that `usage.loops` comes back."""
    for effort, most in (("none", 2), ("low", 2), ("medium", 4), ("high", 6), ("max", 8)):
        said = loops(ask(client, reasoning_effort=effort))
        check(f"reasoning_effort {effort} is {most} loops", said == {"mean": most, "max": most}, said)
    said = loops(ask(client, extra_body={"vllm_xargs": {"loops": 6}}))
    check("vllm_xargs has its 6 loops", said == {"mean": 6, "max": 6}, said)
    said = loops(ask(client, extra_body={"vllm_xargs": {"exit_threshold": 0.5}}))
    check("an exit threshold of 0.5 leaves early", (said or {"mean": 4})["mean"] < 4, said)
    said = loops(ask(client, extra_body={"thinking": {"type": "enabled", "budget_tokens": 4096}}))
    check("the gateway makes an effort of a budget of thinking", said == {"mean": 6, "max": 6}, said)


def reasoning(client: openai.OpenAI) -> None:
    """Check that reasoning comes apart from the answer, and in which field a client has to send it back."""
    message = ask(client).choices[0].message
    check("the answer is right", message.content == ANSWER, message)
    check("its reasoning is in reasoning_content", getattr(message, "reasoning_content", None) == THOUGHT, message)
    turn = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    turn.append({"role": "user", "content": "Answer at once. Ann is in Rome. Where is Ann?"})
    sizes = {}
    for field in ("nothing", "reasoning", "reasoning_content"):
        turn[1] = {"role": "assistant", "content": ANSWER} | ({} if field == "nothing" else {field: THOUGHT})
        sizes[field] = ask(client, messages=turn).usage.prompt_tokens
    check("a turn sent back with `reasoning` keeps it", sizes["reasoning"] > sizes["nothing"], sizes)
    tell("`reasoning_content` of a turn that is sent back", sizes["reasoning_content"] > sizes["nothing"])


def streams(client: openai.OpenAI) -> None:
    """Check that a stream says the same, reasoning apart, and ends with its usage."""
    *parts, last = ask(client, stream=True, stream_options={"include_usage": True}, reasoning_effort="high")
    deltas = [part.choices[0].delta for part in parts if part.choices]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    said = "".join(delta.content or "" for delta in deltas)
    check("a stream is the same, token by token", (thought, said) == (THOUGHT, ANSWER) and len(deltas) > 8, deltas)
    check("a stream ends with its usage", last.usage is not None and last.usage.completion_tokens == 11, last)
    tell("`usage.loops` of a chat's stream", loops(last) is not None)


def tools(client: openai.OpenAI) -> None:
    """Check that a tool is called, whole and in a stream, and that a JSON schema is obeyed."""
    call = r'<tool_call>\{"name": "locate", "arguments": \{"who": "(Ann|Jack)"\}\}</tool_call>'
    at_once = {"chat_template_kwargs": {"enable_thinking": False}}  # the demo model never saw a tool
    asked: dict[str, Any] = {"tools": [LOCATE], "max_tokens": 200}
    parsed = {"tool_choice": "auto", "extra_body": {**at_once, "structured_outputs": {"regex": call}}}
    calls = ask(client, **asked, **parsed).choices[0].message.tool_calls
    check("a tool is called", bool(calls) and called(calls[0].function.arguments), calls)
    parts = ask(client, stream=True, **asked, **parsed)
    deltas = [call for part in parts for choice in part.choices for call in choice.delta.tool_calls or ()]
    said = "".join(call.function.arguments or "" for call in deltas)
    check("a tool is called in a stream", called(said), deltas)
    message = ask(client, tool_choice="required", extra_body=at_once, **asked).choices[0].message
    calls = list(message.tool_calls or [])
    tell("`strict` of a tool", bool(calls) and called(calls[0].function.arguments))
    schema = {"type": "object", "properties": {"place": {"enum": ["Rome", "Bern"]}}, "required": ["place"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    content = ask(client, response_format=form, max_tokens=200).choices[0].message.content
    check("a JSON schema is obeyed", json.loads(content or "{}").get("place") in ("Rome", "Bern"), content)


def called(arguments: str) -> bool:
    """Return whether the tool's arguments are as its schema has them."""
    try:
        return json.loads(arguments)["who"] in PEOPLE
    except (ValueError, LookupError, TypeError):
        return False


def told(client: openai.OpenAI) -> None:
    """Check where the loops of each token come back."""
    asked: dict[str, Any] = {"extra_body": {"vllm_xargs": {"return_loops": True}}, "max_tokens": 5}
    choice = ask(client, **asked).choices[0]
    fields = getattr(choice, "provider_specific_fields", None) or {}
    check("loops of tokens are in provider_specific_fields", fields.get("loops") == [4] * 5, choice)
    parts = [part.choices[0] for part in ask(client, stream=True, **asked) if part.choices]
    said = [each for part in parts for each in getattr(part, "loops", None) or ()]
    check("loops of tokens are in a stream's choices", said == [4] * 5, parts)


def errors(client: openai.OpenAI) -> None:
    """Check that what the server refuses is refused with its words and its status."""
    for stream in (False, True):
        try:
            ask(client, stream=stream, extra_body={"vllm_xargs": {"loops": 99}})
            refused = "nothing"
        except openai.BadRequestError as error:
            refused = str(error)
        where = "a stream" if stream else "a request"
        check(f"{where} with 99 loops is a 400 that says why", "from 1 to 8" in refused, refused)
    try:
        ask(client, messages=[{"role": "user", "content": "Ann is in Rome. " * 1000}])
        refused = "nothing"
    except openai.BadRequestError as error:
        refused = str(error)
    check("a prompt that is too long is the gateway's own error for it", "ContextWindowExceeded" in refused, refused)


def other_routes(client: openai.OpenAI) -> None:
    """Check completions and the Responses API."""
    asked: dict[str, Any] = {"model": MELT.name, "prompt": "Find", "max_tokens": 3}
    said = loops(client.completions.create(**asked, extra_body={"vllm_xargs": {"loops": 6}}))
    check("completions have 6 loops", said == {"mean": 6, "max": 6}, said)
    *_, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    tell("`usage.loops` of a completion's stream", loops(last) is not None)
    answer = client.responses.create(model=MELT.name, input=QUESTION, reasoning={"effort": "low"})
    check("responses have an effort's 2 loops", loops(answer) == {"mean": 2, "max": 2}, answer)


def anthropic(url: str) -> None:
    """Check Anthropic's API, which the gateway translates."""
    body: dict[str, Any] = {"model": MELT.name, "max_tokens": 64, "messages": [{"role": "user", "content": QUESTION}]}
    headers = {"Content-Type": "application/json", "x-api-key": GATEWAYS_KEY}
    request = urllib.request.Request(f"{url}/v1/messages", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as said:
        answer = json.load(said)
    texts = [part.get("thinking") or part.get("text") for part in answer["content"]]
    check("Anthropic's API has thinking and text", texts == [THOUGHT, ANSWER], answer)
    tell("`usage.loops` in Anthropic's API", "loops" in answer["usage"])


if __name__ == "__main__":
    main()
