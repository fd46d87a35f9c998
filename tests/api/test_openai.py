"""OpenAI's API as people use it, through the official client, against vLLM's own server."""

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import openai
import pytest

from melt_serve.bundled import MELT
from melt_serve.config import MeltConfig
from melt_serve.server_process import answers
from melt_serve.task.who_is_where import questions

MODEL = "melt-demo"
ASKED = sorted(islice(questions("heldout", seed=5), 20), key=lambda question: question.kind)  # those that reason first


def chat(client, question, **arguments):
    messages = [{"role": "user", "content": question.prompt}]
    defaults = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 64}
    return client.chat.completions.create(**{**defaults, **arguments})


def get(url):
    with urllib.request.urlopen(url) as response:
        return response.read().decode()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_held_out_questions_are_answered_right(client):
    right = sum(question.check(chat(client, question).choices[0].message.content or "") for question in ASKED)
    assert right >= 18


def test_reasoning_is_split_from_the_answer(client):
    (choice,) = chat(client, ASKED[0]).choices
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning.strip() and "think>" not in choice.message.reasoning
    assert "think>" not in choice.message.content


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = chat(client, ASKED[0]).choices[0].message
    pieces = list(chat(client, ASKED[0], stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in pieces if chunk.choices]
    assert len(deltas) > 5
    assert "".join(delta.content or "" for delta in deltas) == whole.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == whole.reasoning
    assert pieces[-1].usage.completion_tokens > 5


def test_what_is_said_does_not_depend_on_streams_crowds_or_what_is_cached(client, server):
    def said(question, **arguments):
        answer = chat(client, question, logprobs=True, top_logprobs=5, **arguments)
        choices = [chunk.choices[0] for chunk in answer if chunk.choices] if "stream" in arguments else answer.choices
        return [
            (token.token, token.logprob) for choice in choices if choice.logprobs for token in choice.logprobs.content
        ]

    def hits():
        found = re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", get(f"{server}/metrics"), re.MULTILINE)
        return float(found[1])

    asked = ASKED[:8]
    alone = [said(question) for question in asked]
    before = hits()
    with ThreadPoolExecutor(len(asked)) as crowd:
        crowded = list(crowd.map(lambda question: said(question, stream=True), asked))
    assert hits() > before
    for one, other in zip(alone, crowded, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [value for _, value in one] == pytest.approx([value for _, value in other], abs=1e-4)


def test_completions_continue_a_text(client, server):
    messages = [{"role": "user", "content": ASKED[0].prompt}]
    tokens = post(f"{server}/tokenize", {"model": MODEL, "messages": messages})
    assert 40 <= tokens["count"] <= 120
    completion = client.completions.create(model=MODEL, prompt=tokens["tokens"], temperature=0, max_tokens=64)
    assert completion.choices[0].text.startswith("<think>")
    assert completion.usage.prompt_tokens == tokens["count"]


def test_tokens_can_be_turned_back_into_text(server):
    text = "Where is the ball? Größe {1}"
    tokens = post(f"{server}/tokenize", {"model": MODEL, "prompt": text})["tokens"]
    assert post(f"{server}/detokenize", {"model": MODEL, "tokens": tokens})["prompt"] == text


def test_log_probabilities_come_with_their_alternatives(client):
    (choice,) = chat(client, ASKED[0], logprobs=True, top_logprobs=3).choices
    assert len(choice.logprobs.content) > 5
    for token in choice.logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == max(alternative.logprob for alternative in token.top_logprobs)


def test_n_gives_that_many_choices(client):
    choices = chat(client, ASKED[0], n=3, temperature=1.5, seed=1).choices
    assert [choice.index for choice in choices] == [0, 1, 2]


def test_the_same_seed_gives_the_same_answer(client):
    def sample(seed):
        unheard_of = [{"role": "user", "content": "Say anything, {} or [] or 42!"}]
        message = chat(client, ASKED[0], messages=unheard_of, temperature=2.0, seed=seed).choices[0].message
        return message.reasoning, message.content

    assert sample(11) == sample(11)
    assert len({sample(seed) for seed in range(4)}) > 1


def said_at(client, **depth):
    """The likeliest candidates of every token, whose likelihoods tell one depth from another."""
    content = chat(client, ASKED[0], logprobs=True, top_logprobs=5, max_tokens=8, **depth).choices[0].logprobs.content
    return [alternative.logprob for token in content for alternative in token.top_logprobs]


@pytest.mark.parametrize(("effort", "loops"), [("minimal", 2), ("low", 2), ("medium", 4), ("high", 6), ("max", 8)])
def test_reasoning_effort_turns_the_loops(client, effort, loops):
    asked = said_at(client, extra_body={"vllm_xargs": {"loops": loops}})
    assert said_at(client, reasoning_effort=effort) == pytest.approx(asked, abs=1e-4)
    by_default = said_at(client)
    assert (by_default == pytest.approx(asked, abs=1e-2)) == (loops == 4)


@pytest.mark.parametrize("effort", ["none", "minimal"])
def test_the_least_effort_still_comes_to_an_end(client, effort):
    """After one loop alone the bundled checkpoint would repeat a name to the limit."""
    for question in ASKED:
        assert chat(client, question, reasoning_effort=effort).choices[0].finish_reason == "stop"


def test_more_effort_finds_what_less_effort_does_not(client):
    """Every loop takes a silent answer one step further along its chain, and there is nothing beyond the place."""
    silent = (question for question in questions("heldout", 5, kinds=["silent"]) if len(question.steps) == 4)
    for question in islice(silent, 4):
        said = {
            effort: chat(client, question, reasoning_effort=effort).choices[0].message.content
            for effort in ("low", "medium", "high", "max")
        }
        assert said["low"].startswith(f"In {question.steps[1]}") and not question.check(said.pop("low"))
        assert set(said.values()) == {question.answer}


def test_an_exit_threshold_saves_loops_and_keeps_the_answers(client):
    answered = [chat(client, question, extra_body={"vllm_xargs": {"exit_threshold": 0.5}}) for question in ASKED]
    right = sum(
        question.check(answer.choices[0].message.content) for question, answer in zip(ASKED, answered, strict=True)
    )
    assert right >= len(ASKED) - 1
    assert sum(answer.usage.loops["mean"] for answer in answered) / len(ASKED) < 4 / 1.4


def test_every_answer_tells_how_many_loops_its_tokens_ran(client, server):
    def told(**arguments):
        return chat(client, ASKED[0], **arguments).usage.loops

    assert told() == {"mean": 4.0, "max": 4}
    assert told(reasoning_effort="low", n=3, temperature=1.0) == {"mean": 2.0, "max": 2}
    early = told(extra_body={"vllm_xargs": {"exit_threshold": 0.5}})
    assert 1 <= early["mean"] <= early["max"] <= 4 and early["mean"] < 4
    *_, last = chat(client, ASKED[0], stream=True, stream_options={"include_usage": True}, reasoning_effort="low")
    assert last.usage.loops == {"mean": 2.0, "max": 2}

    prompts = {"model": MODEL, "prompt": ["Find", "Where is"], "max_tokens": 3}
    assert client.completions.create(**prompts).usage.loops == {"mean": 4.0, "max": 4}
    one_loop = {"extra_body": {"vllm_xargs": {"loops": 1}}, "stream_options": {"include_usage": True}}
    *_, last = client.completions.create(**prompts, **one_loop, stream=True)
    assert last.usage.loops == {"mean": 1.0, "max": 1}

    metrics = get(f"{server}/metrics")
    assert re.search(r'^melt_requests_total\{loops="2"\} [1-9]', metrics, re.MULTILINE)
    assert re.search(r'^melt_token_loops_bucket\{le="1.0",loops="1"\} [1-9]', metrics, re.MULTILINE)
    assert re.search(r'^melt_token_loops_sum\{loops="2"\} [1-9]', metrics, re.MULTILINE)


def test_a_contrast_of_depths_moves_the_answer_on_in_chats_completions_and_responses(client):
    without, contrasted, to_one = (
        said_at(client, extra_body={"vllm_xargs": {"loops": 3, **asked}})
        for asked in ({}, {"contrast": 1.0}, {"contrast": 1.0, "contrast_loop": 1})
    )
    assert contrasted == pytest.approx(to_one, abs=1e-4) and contrasted != pytest.approx(without, abs=1e-2)

    def first(**asked):
        arguments = {"model": MODEL, "prompt": ASKED[0].prompt, "max_tokens": 1, "temperature": 0, "logprobs": 3}
        choice = client.completions.create(**arguments, extra_body={"vllm_xargs": asked}).choices[0]
        return list(choice.logprobs.top_logprobs[0].values())

    assert first(contrast=2, contrast_loop=1) != pytest.approx(first(), abs=1e-2)
    with pytest.raises(openai.BadRequestError, match="contrast_loop must be a whole number from 1 to 3"):
        extra = {"vllm_xargs": {"contrast": 1, "contrast_loop": 4}}
        client.responses.create(model=MODEL, input="Where?", extra_body=extra, stream=True)


def tokens_told(choices):
    """Join what choices, whole ones or those of a stream, tell of their tokens: log-probabilities, loops and exits."""
    told = {}
    for choice in choices:
        logprobs, loops, exits = told.setdefault(choice.index, ([], [], []))
        content = choice.logprobs and getattr(choice.logprobs, "content", None)
        logprobs += [token.logprob for token in content] if content else getattr(choice.logprobs, "token_logprobs", [])
        loops += getattr(choice, "loops", [])
        exits += getattr(choice, "exit_probabilities", [])
    return told


def assert_same(told, expected):
    assert sorted(told) == sorted(expected)
    for index, (logprobs, loops, exits) in expected.items():
        assert told[index][1] == loops and told[index][0] == pytest.approx(logprobs, abs=1e-4)
        assert list(chain(*told[index][2])) == pytest.approx(list(chain(*exits)), abs=1e-4)


EXITS_TOLD = {"vllm_xargs": {"exit_threshold": 0.5, "return_loops": True}}


@pytest.mark.parametrize("arguments", [{}, {"n": 3, "temperature": 1.0, "seed": 1}, {"stop": [" is"]}], ids=str)
@pytest.mark.parametrize("logprobs", [True, False])
def test_a_chat_tells_what_each_token_ran_beside_its_log_probability(client, arguments, logprobs):
    asked = {"logprobs": logprobs, "extra_body": EXITS_TOLD, **arguments}
    answer = chat(client, ASKED[0], **asked)
    told = tokens_told(answer.choices)
    loops = [ran for _, each, _ in told.values() for ran in each]
    assert len(loops) == answer.usage.completion_tokens and sum(loops) / len(loops) == answer.usage.loops["mean"]
    assert len(set(loops)) > 1
    for said, ran, exits in told.values():
        assert len(said) == (len(ran) if logprobs else 0) and [len(each) for each in exits] == ran
        for each in exits:
            stays = 1.0
            for probability in each:
                assert 1 - stays < 0.5
                stays *= 1 - probability
            assert 1 - stays >= 0.5 or len(each) == 4
    pieces = [choice for chunk in chat(client, ASKED[0], stream=True, **asked) for choice in chunk.choices]
    assert_same(tokens_told(pieces), told)
    if logprobs:
        counts = [(len(piece.logprobs.content or []) if piece.logprobs else 0) for piece in pieces]
        assert [len(getattr(piece, "loops", [])) for piece in pieces] == counts
    assert "loops" not in chat(client, ASKED[0], max_tokens=2).choices[0].model_extra


def test_a_part_of_a_stream_has_the_loops_of_its_tokens_and_of_all_so_far(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = list(chat(client, ASKED[0], stream=True, stream_options=options, extra_body=EXITS_TOLD))
    (last,) = (part for part in parts if part.choices and part.choices[0].finish_reason)
    assert last.choices[0].loops and last.usage.loops == parts[-1].usage.loops


def test_an_echo_alone_has_no_tokens_to_tell_of(client):
    echo = {"model": MODEL, "prompt": "Where is", "echo": True, "max_tokens": 0, "logprobs": 1}
    (choice,) = client.completions.create(**echo, extra_body=EXITS_TOLD).choices
    assert choice.text == "Where is" and not getattr(choice, "loops", None)


def test_completions_tell_it_too_for_each_answer_to_each_prompt(client):
    prompts = {"model": MODEL, "prompt": ["Find everybody.", "Where is"], "n": 2, "max_tokens": 9, "logprobs": 1}
    asked = {**prompts, "temperature": 1.0, "seed": 3, "extra_body": EXITS_TOLD}
    whole = tokens_told(client.completions.create(**asked).choices)
    pieces = [choice for chunk in client.completions.create(**asked, stream=True) for choice in chunk.choices]
    assert_same(tokens_told(pieces), whole)
    assert sorted(whole) == [0, 1, 2, 3]
    assert all(len(said) == len(ran) == len(exits) > 0 for said, ran, exits in whole.values())


def test_no_reasoning_effort_skips_the_reasoning_too(client):
    message = chat(client, ASKED[0], reasoning_effort="none").choices[0].message
    assert not message.reasoning and message.content


def test_loops_turn_completions_and_responses_too(client, server):
    def first(loops):
        depth = {} if loops is None else {"extra_body": {"vllm_xargs": {"loops": loops}}}
        answer = client.completions.create(
            model=MODEL, prompt=ASKED[0].prompt, max_tokens=1, temperature=0, logprobs=3, **depth
        )
        return list(answer.choices[0].logprobs.top_logprobs[0].values())

    assert first(1) != pytest.approx(first(4), abs=1e-2)
    assert first(None) == pytest.approx(first(4), abs=1e-4)

    def asked_for(loops):
        found = re.search(rf'^melt_requests_total\{{loops="{loops}"\}} (\S+)$', get(f"{server}/metrics"), re.MULTILINE)
        return float(found[1])

    before = asked_for(2)
    arguments = {"model": MODEL, "input": ASKED[0].prompt, "temperature": 0, "max_output_tokens": 64}
    response = client.responses.create(**arguments, reasoning={"effort": "low"})
    assert response.output_text and response.usage.loops == {"mean": 2.0, "max": 2}
    assert response.kv_transfer_params is None
    assert asked_for(2) == before + 1
    *_, last = client.responses.create(**arguments, reasoning={"effort": "high"}, stream=True)
    assert last.response.usage.loops == {"mean": 6.0, "max": 6}


def test_info_tells_what_is_served_and_how_deep_it_may_think(server):
    info = json.loads(get(f"{server}/melt/info"))
    config = MeltConfig.from_pretrained(MELT)
    assert info["models"] == [MODEL] and info["architecture"] == "MeltForCausalLM"
    assert (info["default_loops"], info["max_loops"]) == (config.total_ut_steps, config.max_loops)
    assert info["effort_loops"] == config.loops_by_effort
    facts = dict(
        re.findall(r'(\w+)="([^"]*)"', re.search(r"^vllm:cache_config_info.*", get(f"{server}/metrics"), re.M)[0])
    )
    tokens = int(facts["num_gpu_blocks"]) * int(facts["block_size"])
    assert info["kv_capacity_tokens"] == tokens
    assert info["kv_bytes_per_token"] == int(facts["kv_cache_memory_bytes"]) // tokens
    assert info["looplm_kv_bytes_per_token"] == config.total_ut_steps * info["kv_bytes_per_token"]


def test_metrics_show_the_rows_of_running_requests_beside_a_looplms(client, server):
    def metrics():
        found = re.findall(r'^(melt_\w+)\{engine="0"\} (\S+)$', get(f"{server}/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in found}

    config, row = MeltConfig.from_pretrained(MELT), json.loads(get(f"{server}/melt/info"))["kv_bytes_per_token"]
    endless = {"max_tokens": 500, "extra_body": {"ignore_eos": True, "vllm_xargs": {"loops": 3}}}
    stream = chat(client, ASKED[0], stream=True, **endless)
    for _ in zip(range(20), stream, strict=False):
        pass
    running = metrics()
    stream.close()
    assert running["melt_kv_bytes_per_token"] == row
    assert running["melt_kv_capacity_tokens"] == json.loads(get(f"{server}/melt/info"))["kv_capacity_tokens"]
    assert running["melt_kv_final_rows_bytes"] >= 100 * row  # the prompt's tokens alone
    assert running["melt_kv_looplm_bytes"] == 3 * running["melt_kv_final_rows_bytes"]
    assert running["melt_kv_open_rows_bytes"] == 0  # token mode has none
    assert running["melt_transient_state_bytes"] % (config.num_hidden_layers * config.hidden_size * 2) == 0
    assert running["melt_grid_pieces_total"] > running["melt_grid_cuts_total"] > 0


def test_stop_ends_the_answer_before_the_word(client):
    completion = chat(client, ASKED[0], stop=["the"])
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "stop"
    assert "the" not in (message.reasoning or "") + (message.content or "")


def test_a_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["attic", "barn"]}, "sure": {"type": "boolean"}},
        "required": ["place", "sure"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    message = chat(client, ASKED[0], response_format=response_format, max_tokens=200).choices[0].message
    answer = json.loads(message.content)
    assert answer["place"] in ("attic", "barn") and isinstance(answer["sure"], bool)


# The demo model never saw a tool, and does not stop thinking about one.
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a thing.",
        "parameters": {
            "type": "object",
            "properties": {"thing": {"enum": ["ball", "lamp"]}},
            "required": ["thing"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_a_tool_call_that_is_asked_for_is_made(client, server, choice):
    blank = [post(f"{server}/tokenize", {"model": MODEL, "prompt": text})["tokens"][0] for text in "\n\r\t "]
    no_blanks = dict.fromkeys(map(str, blank), -100)  # where JSON may go on with them, the demo model always does
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    arguments = {"tools": [strict], "tool_choice": choice, "logit_bias": no_blanks, "extra_body": AT_ONCE}
    message = chat(client, ASKED[0], **arguments).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "find"
    assert json.loads(call.function.arguments)["thing"] in ("ball", "lamp")


def test_a_tool_call_in_the_models_text_is_parsed(client):
    text = r'<tool_call>\{"name": "find", "arguments": \{"thing": "(ball|lamp)"\}\}</tool_call>'
    extra = {**AT_ONCE, "structured_outputs": {"regex": text}}
    completion = chat(client, ASKED[0], tools=[TOOL], tool_choice="auto", max_tokens=100, extra_body=extra)
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "find"
    assert json.loads(call.function.arguments)["thing"] in ("ball", "lamp")


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert answers(f"{server}/health")
    metrics = get(f"{server}/metrics")
    assert re.search(r'vllm:generation_tokens_total\{[^}]*model_name="melt-demo"[^}]*\} [1-9]', metrics)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"messages": [{"role": "user", "content": "Where is the ball? " * 200}]}, openai.BadRequestError, "768"),
        ({"temperature": "warm"}, openai.BadRequestError, "temperature"),
        ({"messages": "hello"}, openai.BadRequestError, "messages"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"vllm_xargs": {"loops": 9}}}, openai.BadRequestError, "from 1 to 8"),
        ({"extra_body": {"vllm_xargs": {"loops": "deep"}}}, openai.BadRequestError, "from 1 to 8"),
        ({"extra_body": {"vllm_xargs": {"contrast": 11}}}, openai.BadRequestError, "from 0, for none, to 10"),
        (
            {"extra_body": {"vllm_xargs": {"return_loops": "yes"}}, "stream": True},
            openai.BadRequestError,
            "true or false",
        ),
        ({"reasoning_effort": "hardest"}, openai.BadRequestError, "reasoning_effort"),
        ({"extra_body": {"use_beam_search": True}, "n": 2}, openai.BadRequestError, "beam search"),
        ({"extra_body": {"use_beam_search": True}, "n": 2, "stream": True}, openai.BadRequestError, "beam search"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_request_gets_openais_error_and_the_server_lives_on(client, arguments, error, says):
    with pytest.raises(error, match=says) as refused:
        chat(client, ASKED[0], **arguments)
    assert refused.value.body["code"] == refused.value.status_code
    assert refused.value.body["message"]
    assert chat(client, ASKED[1]).choices[0].message.content


def test_a_prompt_as_long_as_the_context_is_refused_not_kept_waiting(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=MODEL, prompt=[5] * 768, max_tokens=1)
    assert client.completions.create(model=MODEL, prompt=[5] * 767, max_tokens=1).choices[0].finish_reason


def test_a_model_is_found_by_its_name(client):
    (listed,) = client.models.list().data
    assert client.models.retrieve("melt-demo").id == listed.id == "melt-demo"
    for unknown in ("other", "org/name"):
        with pytest.raises(openai.NotFoundError, match=f"no model '{unknown}' here: melt-demo"):
            client.models.retrieve(unknown)
