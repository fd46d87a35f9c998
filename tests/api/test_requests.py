"""On every route: requests with a mistake are refused before an answer begins, and depth is taken and told."""

import json
import re
import urllib.error
import urllib.request

import pytest

MODEL = {"model": "melt-demo"}
MESSAGES = {"messages": [{"role": "user", "content": "Find everybody. Ann is in Rome. Where is Ann?"}]}
GENERATES = {
    "/v1/chat/completions": {**MODEL, **MESSAGES, "max_tokens": 4},
    "/v1/completions": {**MODEL, "prompt": "Ann is", "max_tokens": 4},
    "/v1/responses": {**MODEL, "input": "Where is Ann?", "max_output_tokens": 4},
    "/v1/messages": {**MODEL, **MESSAGES, "max_tokens": 4},
    "/v1/chat/completions/batch": {**MODEL, "messages": [MESSAGES["messages"]] * 2, "max_tokens": 4},
    "/inference/v1/generate": {**MODEL, "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}},
}
STREAMS = [path for path in GENERATES if not path.endswith("/batch")]


def ask(server, path, body, **headers):
    """Return the status, the kind of answer and its text."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def asking(path, depth, **more):
    """Return the route's body, with vLLM's arguments of its own where they belong."""
    body = {**GENERATES[path], **more}
    if path == "/inference/v1/generate":
        return {**body, "sampling_params": {**body["sampling_params"], "extra_args": depth}}
    return {**body, "vllm_xargs": depth}


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("depth", [{"loops": 99}, {"loops": "x" * 10_000}, {"exit_threshold": 7}, {"loops": True}])
def test_a_depth_that_cannot_be_is_refused_before_a_stream_begins(server, path, depth):
    status, kind, text = ask(server, path, asking(path, depth, stream=True))
    assert (status, kind) == (400, "application/json")
    assert next(iter(depth)) in json.loads(text)["error"]["message"] and len(text) < 1500
    assert ask(server, path, asking(path, depth))[0] == 400


@pytest.mark.parametrize("path", STREAMS)
def test_so_is_all_that_vllm_itself_refuses(server, path):
    wrong = {"stop_token_ids": [10**6]} if path != "/v1/messages" else {"top_p": 7}
    if path == "/v1/responses":
        wrong = {"structured_outputs": {"regex": "("}}
    body = {**GENERATES[path], **wrong, "stream": True}
    if path == "/inference/v1/generate":
        body["sampling_params"] = {"max_tokens": 4, "stop_token_ids": [10**6]}
    status, kind, text = ask(server, path, body)
    assert (status, kind) == (400, "application/json"), text


@pytest.mark.parametrize("path", GENERATES)
def test_so_is_a_priority_that_no_engine_can_be_sent(server, path):
    status, kind, text = ask(server, path, GENERATES[path], **{"X-Vllm-Priority": "9" * 30})
    assert (status, kind) == (400, "application/json") and "X-Vllm-Priority" in json.loads(text)["error"]["message"]
    assert ask(server, path, GENERATES[path], **{"X-Vllm-Priority": "9"})[0] == 200


def test_more_prompts_than_a_request_may_have_are_refused(server):
    for more in ({"prompt": ["a"] * 2049}, {"prompt": ["a"] * 17, "n": 128}):
        status, kind, text = ask(server, "/v1/completions", {**GENERATES["/v1/completions"], **more})
        assert (status, kind) == (400, "application/json")
        assert "--max-items" in json.loads(text)["error"]["message"] and "2048" in text


def test_an_effort_that_nobody_defined_is_refused_before_a_stream_begins(server):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        for wrong in ({"reasoning_effort": "hardest"}, {"reasoning": {"effort": "hardest"}}):
            status, kind, text = ask(server, path, {**GENERATES[path], **wrong, "stream": True})
            assert (status, kind) == (400, "application/json") and "effort" in text


@pytest.mark.parametrize("path", GENERATES)
def test_every_route_that_generates_tells_its_loops_and_nothing_of_how_they_come(server, path):
    asked = [asking(path, {"loops": 3})]
    if path in STREAMS:
        asked.append(asking(path, {"loops": 3}, stream=True, stream_options={"include_usage": True}))
    for body in asked:
        if path in ("/v1/messages", "/v1/responses"):
            body.pop("stream_options", None)
        status, _, text = ask(server, path, body)
        assert status == 200 and re.search(r'"loops": ?\{"mean": ?3.0, ?"max": ?3\}', text), text
        assert "melt_loops" not in text


def counted(server):
    """Return how many tokens of five-loop requests the metrics count."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as answer:
        found = re.search(r'^melt_token_loops_count\{loops="5"\} (\S+)$', answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("path", [path for path in GENERATES if path != "/inference/v1/generate"])  # which has no text
def test_an_answer_that_a_stop_string_ends_tells_its_loops_too(server, path):
    stop = {"stop_sequences" if path == "/v1/messages" else "stop": [" "]}
    several = {"n": 2, "temperature": 1} if path in ("/v1/chat/completions", "/v1/completions") else {}
    options = {} if path in ("/v1/messages", "/v1/responses") else {"stream_options": {"include_usage": True}}
    asked = [asking(path, {"loops": 5}, **stop, **more) for more in ({}, several)]
    if path in STREAMS:
        asked += [asking(path, {"loops": 5}, **stop, **more, stream=True, **options) for more in ({}, several)]
    for body in asked:
        body.update({name: 64 for name in ("max_tokens", "max_output_tokens") if name in body})
        before = counted(server)
        status, _, text = ask(server, path, body)
        assert status == 200 and re.search(r'"loops": ?\{"mean": ?5.0, ?"max": ?5\}', text), text
        assert "melt_loops" not in text
        tokens = int(re.findall(r'"(?:completion|output)_tokens": ?(\d+)', text)[-1])
        assert tokens < 64 and counted(server) == before + tokens


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("spelled", "loops"),
    [
        ({"reasoning_effort": "low"}, 2),
        ({"reasoning": {"effort": "low"}}, 2),
        ({"reasoning": {"effort": "high", "max_tokens": 100}}, 6),
        ({"reasoning": {}}, 4),
        ({"reasoning": {"enabled": True}}, 4),
        ({"reasoning": "low"}, 2),
    ],
)
def test_an_effort_is_understood_as_openai_and_gateways_spell_it(server, path, spelled, loops):
    status, _, text = ask(server, path, {**GENERATES[path], **spelled})
    if path == "/v1/responses" and spelled == {"reasoning": "low"}:  # its own field, and no object
        assert status == 400
    else:
        assert status == 200 and json.loads(text)["usage"]["loops"]["max"] == loops, text


def test_none_switches_reasoning_off_however_it_is_spelled(server):
    body = {**GENERATES["/v1/chat/completions"], "temperature": 0}
    said = [
        json.loads(ask(server, "/v1/chat/completions", {**body, **spelled})[2])["choices"][0]["message"]
        for spelled in (
            {"reasoning_effort": "none"},
            {"reasoning": {"effort": "none"}},
            {"reasoning": {"enabled": False}},
        )
    ]
    assert said[0]["content"] and said[0] == said[1] == said[2]


def test_requests_count_when_they_are_accepted_and_once_for_all_their_answers(server):
    def counted():
        with urllib.request.urlopen(f"{server}/metrics") as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(r"^melt_requests_total\{.*\} (\S+)$", text, re.MULTILINE))

    before = counted()
    completion = GENERATES["/v1/completions"]
    for wrong in ({"prompt": [10**6]}, {"structured_outputs": {"regex": "("}}, {"vllm_xargs": {"loops": 9}}):
        for stream in (False, True):
            assert ask(server, "/v1/completions", {**completion, **wrong, "stream": stream})[0] == 400
    assert counted() == before
    assert ask(server, "/v1/completions", {**completion, "n": 3, "temperature": 1})[0] == 200
    assert ask(server, "/v1/completions", {**completion, "stream": True})[0] == 200
    assert counted() == before + 2


def test_a_refused_value_is_not_repeated_at_length(server):
    tokens = {"logit_bias": {str(10**6 + number): 1 for number in range(10_000)}}
    status, _, text = ask(server, "/v1/chat/completions", {**GENERATES["/v1/chat/completions"], **tokens})
    assert status == 400 and len(text) < 1500
    status, _, text = ask(server, "/v1/chat/completions", {**GENERATES["/v1/chat/completions"], "model": "m" * 10**5})
    assert status == 404 and len(text) < 1500
