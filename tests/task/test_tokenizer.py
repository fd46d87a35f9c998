"""The demo's tokenizer: a word is a token, any text survives, and the chat template covers a chat."""

from itertools import islice

import pytest
from transformers import AutoTokenizer

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.task.tokenizer import MARKS, VOCABULARY, build_tokenizer
from melt_serve.task.who_is_where import NAMES, PLACES, questions

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def render(tokenizer, messages, **arguments):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)


def test_every_word_of_the_task_is_one_token(tokenizer):
    words = {*NAMES, *PLACES, *"everybody is in with Where".split()}
    assert {word: len(tokenizer.encode(f" {word}")) for word in words} == dict.fromkeys(words, 1)
    assert all(len(tokenizer.encode(mark)) == 1 for mark in MARKS)
    assert len(tokenizer) <= VOCABULARY


@pytest.mark.parametrize("text", ['{"a": [1, -2.5e3, "x\\n"]}', "Größe, 数学, 🙂", "  two  spaces\n\ttab ", "</think>"])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_span_four_chunks(tokenizer):
    lengths = {
        len(tokenizer.encode(render(tokenizer, [{"role": "user", "content": question.prompt}])))
        for question in islice(questions("heldout", 0), 200)
    }
    assert min(lengths) >= 60 and max(lengths) <= 200
    assert {-(-length // 32) for length in lengths} == {4}


def test_the_template_shows_a_whole_chat(tokenizer):
    call = {"type": "function", "function": {"name": "find", "arguments": {"thing": "ball"}}}
    text = render(
        tokenizer,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it?"}]},
            {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
            {"role": "tool", "content": "hall"},
        ],
        tools=[TOOL],
    )
    for part in ("Be brief.", '"name": "find"', "Where is it?", "<think>I look.</think>", "<tool_call>", "hall"):
        assert part in text
    assert text.index("Be brief.") < text.index("Where is it?") < text.index("I look.") < text.index("hall")
    assert text.endswith("<|im_start|>assistant\n")


def test_thinking_can_be_left_out(tokenizer):
    chat = [{"role": "user", "content": "Where is it?"}]
    assert render(tokenizer, chat, enable_thinking=False) == render(tokenizer, chat) + "<think></think>"


@pytest.mark.parametrize("path", [LOOPLM, MELT])
def test_the_bundled_tokenizer_is_this_one(tokenizer, path):
    bundled = AutoTokenizer.from_pretrained(path)
    assert bundled.get_vocab() == tokenizer.get_vocab()
    assert bundled.chat_template == tokenizer.chat_template
