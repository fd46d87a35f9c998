"""Records as tokens: what is learnt of a chat is what would be generated, whatever the chat template."""

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from melt_serve.bundled import MELT
from melt_serve.task.who_is_where import questions
from melt_serve.train.data.batch import IGNORED
from melt_serve.train.data.documents import documents_of, fitted
from melt_serve.train.data.records import BrokenRecord, DataError, Record
from melt_serve.train.data.task_batches import encode

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Ann?"},
    {"role": "assistant", "content": "In Rome.", "reasoning_content": "Ann Rome"},
    {"role": "user", "content": "And Bob?"},
    {"role": "assistant", "content": "In Oslo.", "reasoning_content": "Bob Oslo"},
]
SAID = ["<think>Ann Rome</think>In Rome.<|im_end|>", "<think>Bob Oslo</think>In Oslo.<|im_end|>"]
OWN = Path(MELT / "chat_template.jinja").read_text()
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Reasoning is shown of the last reply only, as Qwen's and other templates do."""
ASTRAY = FORGETFUL.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""The prompt begins the reply with what no rendered reply has."""


def tokenizer(template: str = OWN) -> PreTrainedTokenizerFast:
    own = AutoTokenizer.from_pretrained(MELT)
    own.chat_template = template
    return own


def learnt(document, reads: PreTrainedTokenizerFast) -> list[str]:
    """Return the runs of supervised tokens, as text."""
    runs, last = [], False
    for token, supervised in zip(document.tokens.tolist(), document.supervised.tolist(), strict=True):
        if supervised:
            runs = [*runs, []] if not last else runs
            runs[-1].append(token)
        last = supervised
    return [reads.decode(run) for run in runs]


def test_every_reply_of_a_chat_and_its_end_mark_are_learnt():
    reads = tokenizer()
    (document,) = documents_of(Record(messages=CHAT), reads)
    assert learnt(document, reads) == SAID
    rendered = reads.apply_chat_template(CHAT, tokenize=False).rstrip("\n")
    assert reads.decode(document.tokens).rstrip("\n") == rendered


def test_a_template_with_generation_marks_says_itself_what_is_learnt():
    reads = tokenizer(MARKED)
    (document,) = documents_of(Record(messages=CHAT), reads)
    assert learnt(document, reads) == ["In Rome.<|im_end|>", "In Oslo.<|im_end|>"]
    without_marks = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (by_difference,) = documents_of(Record(messages=CHAT), tokenizer(without_marks))
    assert by_difference.tokens.tolist() == document.tokens.tolist()
    assert by_difference.supervised.tolist() == document.supervised.tolist()


def test_a_reply_that_is_rendered_otherwise_later_is_learnt_as_it_is_given():
    """In the second document the first reply stands without its reasoning, and is not learnt."""
    reads = tokenizer(FORGETFUL)
    second, first = documents_of(Record(messages=CHAT), reads)
    assert learnt(first, reads) == SAID[:1] and learnt(second, reads) == SAID[1:]
    assert "Ann Rome" not in reads.decode(second.tokens) and "In Rome." in reads.decode(second.tokens)


def test_what_is_given_is_what_a_server_is_given():
    """Up to each reply, the tokens are those of the prompt that asks for it."""
    for template in (OWN, MARKED, FORGETFUL):
        reads = tokenizer(template)
        documents = documents_of(Record(messages=CHAT), reads)
        for end in (2, 4):
            prompt = reads.apply_chat_template(CHAT[:end], add_generation_prompt=True, return_dict=False)
            assert any(
                document.tokens[: len(prompt)].tolist() == prompt
                and document.supervised[len(prompt)]
                and not document.supervised[len(prompt) - 1]
                for document in documents
            )


def test_the_bundled_tasks_chats_are_learnt_as_by_its_own_batches():
    reads, asked = tokenizer(), list(islice(questions("train", 0), 5))
    batch = encode(asked, reads)
    for question, ids, mask, labels in zip(asked, batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        chat = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.reply}]
        (document,) = documents_of(Record(messages=chat), reads)
        length = int(mask.sum())
        assert document.tokens[:length].tolist() == ids[mask.bool()].tolist()
        assert reads.decode(document.tokens[length:]) == "\n" and not document.supervised[length:].any()
        assert document.supervised[:length].tolist() == (labels != IGNORED)[mask.bool()].tolist()


def test_tools_and_their_calls_reach_the_template():
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "find", "arguments": {"who": "Ann"}}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Rome"},
        {"role": "assistant", "content": "In Rome."},
    ]
    reads = tokenizer()
    (document,) = documents_of(Record(messages=chat, tools=[tool]), reads)
    assert '"name": "find"' in reads.decode(document.tokens).split("<|im_end|>")[0]
    called, said = learnt(document, reads)
    assert called.startswith("<tool_call>") and '{"who": "Ann"}' in called and said == "In Rome.<|im_end|>"


def test_all_of_a_text_is_learnt_and_that_it_ends():
    reads = tokenizer()
    (document,) = documents_of(Record(text="Ann is in Rome."), reads)
    assert learnt(document, reads) == ["Ann is in Rome.<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "template", "says"),
    [
        (Record(messages=CHAT[:2], place="f.jsonl:7"), OWN, "f.jsonl:7: nothing to learn"),
        (Record(messages=[{"role": "user", "content": [{"type": "image"}]}, CHAT[2]]), OWN, "reads text only"),
        (Record(messages=CHAT), ASTRAY, "message 3 is not rendered as what add_generation_prompt begins"),
    ],
)
def test_what_cannot_be_learnt_from_says_why(record, template, says):
    with pytest.raises(BrokenRecord, match=says):
        documents_of(record, tokenizer(template))


def test_a_chat_without_a_template_is_no_broken_record_but_a_wrong_tokenizer():
    with pytest.raises(DataError, match="no chat template") as raised:
        documents_of(Record(messages=CHAT), tokenizer(template=""))
    assert not isinstance(raised.value, BrokenRecord)


def test_too_long_documents_are_cut_split_or_dropped():
    reads = tokenizer()
    (text,) = documents_of(Record(text="Ann is in Rome. " * 5), reads)
    length = len(text) // 2 - 1
    assert fitted(text, len(text), "drop") == [text]
    assert fitted(text, length, "drop") == []
    (cut,) = fitted(text, length, "cut")
    assert cut.tokens.tolist() == text.tokens[:length].tolist()
    parts = fitted(text, length, "split")
    assert [token for part in parts for token in part.tokens.tolist()] == text.tokens.tolist()
    assert all(len(part) <= length for part in parts) and len(parts) == 3
    (chat,) = documents_of(Record(messages=CHAT), reads)
    first_reply = chat.supervised.int().argmax().item()
    assert fitted(chat, first_reply, "cut") == []  # nothing is left to learn
