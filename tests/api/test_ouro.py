"""Files as Ouro's are published, served without a flag: answers end, and reasoning is apart from them."""

import json
import sys
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from openai import BadRequestError, OpenAI

from melt_serve.answers import opens_thinking
from melt_serve.server_process import free_port, running
from tests.ouro_files import END_THINK, THINK, THINKING_TEMPLATE, tokenizer_of, write_ouro

# A chat ends with a line break. After it the model thinks; where it may not, it answers; where neither, it goes on.
SAYS = {
    "\n": (THINK, "well", "Hm"),
    THINK: ("Hm",),
    "Hm": ("so",),
    "so": (END_THINK,),
    END_THINK: ("Yes",),
    "Yes": ("it",),
    "well": ("it",),
    "it": ("is",),
    "is": ("<|im_end|>",),
}
IDS = tokenizer_of(THINKING_TEMPLATE).get_vocab()
ANSWERS_AT_ONCE = {str(IDS[THINK]): -100}
THINKS_ON = {**ANSWERS_AT_ONCE, str(IDS["well"]): -100}


@pytest.fixture(scope="module")
def ouro(tmp_path_factory):
    folder = write_ouro(tmp_path_factory.mktemp("ouro") / "Ouro-tiny-Thinking", SAYS, THINKING_TEMPLATE)
    port = free_port()
    words = [sys.executable, "-m", "melt_serve.cli", "serve", str(folder), "--port", str(port), "--enforce-eager"]
    words += ["--kv-cache-memory-bytes", str(16 << 20), "--max-model-len", "128", "--dtype", "float32"]
    with running(words, port, folder.parent / "log.txt") as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, stream, **options):
    """Return reasoning, content, and how the answer ended."""
    model = client.models.list().data[0].id
    options = {"temperature": 0, "max_tokens": 40, **options}
    messages = [{"role": "user", "content": "Why is it so"}]
    answer = client.chat.completions.create(model=model, messages=messages, stream=stream, **options)
    if not stream:
        (choice,) = answer.choices
        return choice.message.model_extra["reasoning"], choice.message.content, choice.finish_reason
    events = [event.choices[0] for event in answer if event.choices]
    reasoning = "".join(event.delta.model_extra.get("reasoning") or "" for event in events)
    content = "".join(event.delta.content or "" for event in events)
    return reasoning or None, content or None, events[-1].finish_reason


def words(text):
    return text.split() if text else text


@pytest.mark.parametrize("stream", [False, True])
class TestAnswers:
    def test_end_where_the_template_ends_a_turn(self, ouro, stream):
        reasoning, content, ended = ask(ouro, stream)
        assert (words(reasoning), words(content), ended) == (["Hm", "so"], ["Yes", "it", "is"], "stop")

    def test_without_tags_are_all_content(self, ouro, stream):
        reasoning, content, ended = ask(ouro, stream, logit_bias=ANSWERS_AT_ONCE)
        assert (reasoning, words(content), ended) == (None, ["well", "it", "is"], "stop")

    def test_whose_tag_the_prompt_opens_are_split(self, ouro, stream):
        opened = {"chat_template_kwargs": {"enable_thinking": True}}
        reasoning, content, ended = ask(ouro, stream, logit_bias=THINKS_ON, extra_body=opened)
        assert (words(reasoning), words(content), ended) == (["Hm", "so"], ["Yes", "it", "is"], "stop")
        reasoning, content, ended = ask(ouro, stream, logit_bias=THINKS_ON, extra_body=opened, max_tokens=2)
        assert (words(reasoning), content, ended) == (["Hm", "so"], None, "length")

    @pytest.mark.parametrize("effort", ["none", "low", "max"])
    def test_are_split_whatever_the_effort(self, ouro, stream, effort):
        reasoning, content, _ = ask(ouro, stream, reasoning_effort=effort)
        assert (words(reasoning), words(content)) == (["Hm", "so"], ["Yes", "it", "is"])


def test_an_effort_leaves_the_prompt_as_it_is(ouro):
    model = ouro.models.list().data[0].id
    messages = [{"role": "user", "content": "Why is it so"}]
    lengths = {
        effort: ouro.chat.completions.create(
            model=model, messages=messages, max_tokens=1, **({"reasoning_effort": effort} if effort else {})
        ).usage.prompt_tokens
        for effort in (None, "none", "minimal", "high", "max")
    }
    assert len(set(lengths.values())) == 1


def test_a_completion_ends_there_too(ouro):
    model = ouro.models.list().data[0].id
    (choice,) = ouro.completions.create(model=model, prompt="well", temperature=0, max_tokens=40).choices
    assert (choice.text.split(), choice.finish_reason) == (["it", "is"], "stop")


def test_a_clients_own_template_is_not_rendered():
    """It would run in the server's own process."""
    tokenizer = tokenizer_of(THINKING_TEMPLATE)
    pool = SimpleNamespace(apply_chat_template=lambda *args, **options: tokenizer.apply_chat_template(*args, **options))
    for each in (tokenizer, pool):  # vLLM's hide the names of arguments
        assert opens_thinking(each, enable_thinking=True, tokenize=False)
        assert not opens_thinking(each, chat_template="{{ 'Hm <think>' }}")


def test_an_effort_is_loops(ouro):
    model = ouro.models.list().data[0].id
    messages = [{"role": "user", "content": "Why is it so"}]
    ran = {}
    for effort in ("none", "low", "medium", "max"):
        answer = ouro.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=4, reasoning_effort=effort
        )
        ran[effort] = answer.usage.model_extra["loops"]["mean"]
    assert ran == {"none": 1, "low": 2, "medium": 4, "max": 4}


@pytest.mark.parametrize(
    ("depth", "says"),
    [
        ({"loops": 0}, "loops must be a whole number from 1 to 4"),
        ({"loops": 99}, "loops must be a whole number from 1 to 4"),
        ({"exit_threshold": 7}, "exit_threshold must be above 0 and at most 1"),
    ],
)
def test_a_depth_that_cannot_be_is_a_400_that_names_the_range(ouro, depth, says):
    model = ouro.models.list().data[0].id
    with pytest.raises(BadRequestError, match=says):
        ouro.completions.create(model=model, prompt="well", max_tokens=4, extra_body={"vllm_xargs": depth})


def test_loops_and_exits_are_told(ouro):
    model = ouro.models.list().data[0].id
    options = {"prompt": "well", "temperature": 0, "max_tokens": 4}
    answer = ouro.completions.create(model=model, extra_body={"vllm_xargs": {"loops": 3}}, **options)
    assert answer.usage.model_extra["loops"] == {"mean": 3, "max": 3}
    answer = ouro.completions.create(model=model, extra_body={"vllm_xargs": {"exit_threshold": 0.01}}, **options)
    assert answer.usage.model_extra["loops"]["mean"] == 1
    root = str(ouro.base_url).removesuffix("/v1/")
    with urlopen(f"{root}/melt/info") as response:
        info = json.load(response)
    assert (info["default_loops"], info["max_loops"], info["exit_threshold"]) == (4, 4, 1)
    assert info["effort_loops"]["low"] == 2 and "1" in info["now"]["requests_by_loops"]
    with urlopen(f"{root}/metrics") as response:
        assert 'melt_requests_total{loops="3"}' in response.read().decode()
