"""`python -m melt_serve.train data`: what it counts, what it marks, how it fails."""

import json

import pytest
from transformers import AutoTokenizer

from melt_serve.bundled import MELT
from melt_serve.train.__main__ import main
from melt_serve.train.data.documents import documents_of
from melt_serve.train.data.records import Record
from melt_serve.train.data.show import marked

CHAT = [{"role": "user", "content": "Where is Ann?"}, {"role": "assistant", "content": "In Rome."}]


def data(*words: object) -> int:
    """Run `data` with these words; return its exit code."""
    return main(["data", *map(str, words)])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": CHAT}), json.dumps({"text": "Bob is in Oslo."}), "{"]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_it_counts_marks_and_names_what_is_broken(file, capsys):
    assert data(file, "--length", 64, "--chunk-size", 32, "--json") == 3
    shown = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(MELT)
    chat, text = (
        documents_of(record, tokenizer)[0] for record in (Record(messages=CHAT), Record(text="Bob is in Oslo."))
    )
    facts = json.loads(shown.splitlines()[-1])
    assert (facts["records"], facts["broken"], facts["documents"], facts["packs"]) == (3, 1, 2, 1)
    assert facts["tokens"] == len(chat) + len(text) and facts["columns"] == 64
    assert facts["supervised"] == int(chat.supervised.sum()) + len(text) - 1
    assert facts["lost_to_grid"] == 32 - max(len(chat), len(text))
    assert facts["broken_records"][0].startswith(f"{file}:3: not JSON")
    assert f"broken: {file}:3: not JSON" in shown
    assert "<|im_start|>assistant\n⟦In Rome.<|im_end|>⟧" in shown


def test_the_first_token_of_a_text_is_not_learnt_because_nothing_asks_for_it():
    tokenizer = AutoTokenizer.from_pretrained(MELT)
    (document,) = documents_of(Record(text="Ann is in Rome."), tokenizer)
    assert marked(document, tokenizer) == "Ann⟦ is in Rome.<|im_end|>⟧"


def test_good_data_exits_with_0_and_unusable_data_is_one_line(file, tmp_path, capsys):
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    assert data(file, "--streaming") == 0
    file.write_text("{\n")
    for words, says, code in (
        ([file], "chats.jsonl:1: not JSON", 1),
        ([tmp_path / "missing.jsonl"], "missing.jsonl", 1),
        ([file, "--checkpoint", tmp_path / "nowhere"], "nowhere", 2),
    ):
        assert data(*words) == code
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("melt_serve.train: error:") and says in last


def test_help_teaches_and_wrong_words_are_usage_errors(file, capsys):
    with pytest.raises(SystemExit, match="0"):
        data("--help")
    assert "save_to_disk" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        data(file, "--length", "0")
