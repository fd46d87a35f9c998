"""Bodies that are refused before vLLM reads them, each with its field's name; on real servers in test_requests.py."""

import json
import time

import pytest

from melt_serve.api.bodies import MOST_NESTED, find_mistake

CHAT = "/v1/chat/completions"


def mistake(body, path=CHAT, content_type="application/json", headers=(), **limits):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    scope = {"type": "http", "path": path, "headers": [(b"content-type", content_type.encode()), *headers]}
    return find_mistake(scope, content, **limits)


def nested(levels):
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [{"role": "user", "content": "Größe 🙂"}], "max_tokens": None, "temperature": 0.5},
        {"prompt": [0, 511], "top_k": 2**63, "seed": -(2**63)},
        {"vllm_xargs": {"loops": 2, "exit_threshold": 0.5, "mine": ["a", 1]}, "kv_transfer_params": None},
        {"vllm_xargs": {"return_loops": True, "contrast": 1.5}},
        {"structured_outputs": {"regex": "a+"}, "stop": ["\n", ""]},
        {"reasoning": {"enabled": True}, "logit_bias": {"5": -100}},
        {"messages": [], "tools": [{"function": {"parameters": {"properties": {"next": {"$ref": "#"}}}}}]},
    ],
)
def test_what_servers_take_passes(body):
    assert mistake(body) is None


def test_empty_bodies_and_what_is_no_json_are_not_ours_to_judge():
    assert mistake(b"") is None
    assert mistake(b"a=NaN", path="/elsewhere", content_type="application/x-www-form-urlencoded") is None
    assert mistake(b"a=NaN", content_type="") is not None
    assert mistake([1, 2], path="/tokenize") is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"top_p": -Infinity}', "-Infinity is no number"),
        (b'{"logit_bias": {"5": 1e999}}', "logit_bias.5 is too large a number"),
        ({"top_k": 2**64}, "top_k is an integer of more than 64 bits"),
        ({"prompt": [1, 2**64, 3]}, "prompt.1 is an integer of more than 64 bits"),
        ({"prompt": [1, -(2**63) - 1, None]}, "prompt.1 is an integer of more than 64 bits"),
        ({"stop": "\ud800"}, "stop has half of a surrogate pair"),
        ({"bad_words": ["fine", "\udfff"]}, "bad_words has half of a surrogate pair"),
        ({"vllm_xargs": {"\ud800": 1}}, "vllm_xargs has half of a surrogate pair"),
        (b'{"user": "\xff"}', "no JSON that this server takes"),
        (b"{", "no JSON that this server takes"),
        (nested(MOST_NESTED + 1), f"More than {MOST_NESTED} objects"),
        (nested(100_000), f"More than {MOST_NESTED} objects"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, f"More than {MOST_NESTED} objects"),
        ({"x" * 5000: 2**64}, "xxx... is an integer"),
        ([], "the body: Input should be a valid dictionary"),
        ({"structured_outputs": True}, "structured_outputs: Input should be a valid dictionary"),
        ({"vllm_xargs": [1]}, "vllm_xargs: Input should be a valid dictionary"),
        ({"vllm_xargs": {"loops": True}}, "vllm_xargs.loops: must be a number or a text"),
        ({"vllm_xargs": {"exit_threshold": False}}, "vllm_xargs.exit_threshold: must be a number or a text"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs: kv_transfer_params is for servers"),
        ({"kv_transfer_params": {}}, "kv_transfer_params: is for servers"),
        ({"ec_transfer_params": 1}, "ec_transfer_params: is for servers"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict | list) else "",
)
def test_what_would_end_in_an_error_of_the_server_is_refused_by_name(body, says):
    assert says in mistake(body)
    assert len(mistake(body)) < 300


def test_as_deep_as_is_allowed_passes_and_is_judged_to_the_bottom():
    assert mistake(nested(MOST_NESTED), path="/tokenize") is None
    bottom = json.dumps(2**64).encode()
    assert "64 bits" in mistake(b"[" * MOST_NESTED + bottom + b"]" * MOST_NESTED, path="/tokenize")


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/messages", {"reasoning_effort": "low"}, "output_config.effort"),
        ("/generative_scoring", {"vllm_xargs": {"loops": 2}}, "default depth"),
        ("/v1/systemone", {"reasoning_effort": "low"}, "default depth"),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"loops": True}}}, "extra_args.loops"),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"ec_transfer_params": 1}}}, "for servers"),
        ("/inference/v1/abort_requests", {"request_ids": 5}, "request_ids"),
        ("/abort_requests", {"request_ids": {"a": 1}}, "request_ids"),
        ("/scale_elastic_ep", {"new_data_parallel_size": 2}, "no looped model has experts"),
        ("/scale_elastic_ep", [], "the body: Input should be"),
        ("/v1/completions", {"use_beam_search": True, "vllm_xargs": {"loops": 2}}, "default depth"),
        ("/v1/chat/completions", {"use_beam_search": True, "reasoning_effort": "low"}, "default depth"),
        ("/v1/chat/completions", {"use_beam_search": True, "reasoning": {"effort": "low"}}, "default depth"),
        ("/tokenize", {"vllm_xargs": {"kv_transfer_params": {}}}, "for servers"),
        ("/v1/chat/completions/render", {"structured_outputs": []}, "structured_outputs: Input should be"),
        ("/v1/messages/count_tokens", {"messages": []}, "messages: List should have at least 1 item"),
        ("/v1/completions", {"response_format": {"json_schema": {"schema": {"$ref": "#"}}}}, "$ref # leads back"),
        ("/v1/messages", {"tools": [{"input_schema": {"anyOf": [{"$ref": "#"}]}}]}, "tools.0.input_schema: $ref #"),
    ],
)
def test_a_field_that_a_route_would_ignore_or_choke_on_is_refused_there(path, body, says):
    assert says in mistake(body, path)


@pytest.mark.parametrize(
    ("priority", "wrong"),
    [
        (b"5", False),
        (b"-9_0", False),
        (b"high", False),
        (b"9" * 5000, False),
        (b"9" * 30, True),
        (b"-" + b"9" * 30, True),
    ],
)
def test_a_priority_in_a_header_is_no_larger_than_one_in_a_body(priority, wrong):
    says = mistake({}, headers=[(b"x-vllm-priority", priority)])
    assert says == ("X-Vllm-Priority is an integer of more than 64 bits" if wrong else None)


MESSAGE = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "a"}}
PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "prompt", lambda many: {"prompt": ["a"] * many}),
        ("/v1/completions", "prompt", lambda many: {"prompt": [[1, 2]] * many}),
        (CHAT, "messages", lambda many: {"messages": [MESSAGE] * many}),
        (CHAT, "messages.0.content", lambda many: {"messages": [{"role": "user", "content": [PART] * many}]}),
        (CHAT, "tools", lambda many: {"messages": [MESSAGE], "tools": [TOOL] * many}),
        (CHAT, "stop", lambda many: {"messages": [MESSAGE], "stop": ["a"] * many}),
        (CHAT, "structured_outputs.choice", lambda many: {"structured_outputs": {"choice": ["a"] * many}}),
        ("/v1/chat/completions/batch", "messages", lambda many: {"messages": [[MESSAGE]] * many}),
        ("/v1/responses", "input", lambda many: {"input": [MESSAGE] * many}),
        ("/v1/messages", "stop_sequences", lambda many: {"messages": [MESSAGE], "stop_sequences": ["a"] * many}),
        (
            "/inference/v1/generate",
            "sampling_params.bad_words",
            lambda many: {"sampling_params": {"bad_words": ["a"] * many}},
        ),
        ("/generative_scoring", "items", lambda many: {"items": ["a"] * many}),
    ],
)
def test_an_array_has_so_many_members(path, field, body):
    assert mistake(body(8), path, max_items=8) is None
    assert mistake(body(9), path, max_items=8).startswith(
        f"The body is no JSON that this server takes: {field} has 9 members, and this server takes 8: send fewer"
    )


@pytest.mark.parametrize(
    ("path", "body", "answers"),
    [
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 4}, 12),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "n": 5}, 10),
        ("/v1/completions", {"prompt": list(range(100)), "n": 9}, 9),
        ("/v1/completions", {"prompt": "a" * 100, "n": 9}, 9),
        (CHAT, {"messages": [MESSAGE] * 4, "n": 9}, 9),
        ("/v1/chat/completions/batch", {"messages": [[MESSAGE] * 4] * 3, "n": 4}, 12),
        ("/v1/completions", {"prompt": [], "n": 9}, 9),
    ],
)
def test_a_request_has_so_many_answers(path, body, answers):
    assert mistake(body, path, max_items=answers) is None
    says = mistake(body, path, max_items=answers - 1)
    assert says.startswith(f"This asks for {answers} answers, prompts times n, and this server takes {answers - 1}: ")
    assert mistake({**body, "n": None}, path, max_items=answers - 1) is None


def test_a_body_as_large_as_may_be_is_judged_in_little_time():
    started = time.process_time()
    assert mistake({"prompt": list(range(600_000))}) is None
    assert "800000 members" in mistake({"prompt": ["a"] * 800_000})
    assert mistake({"prompt": ["a"] * 800_000}, max_items=800_000) is None
    assert time.process_time() - started < 3
