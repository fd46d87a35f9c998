"""Records in the forms that people have them in give the documents of the plain form."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.train.data.datasets import Corpus
from melt_serve.train.data.documents import documents_of
from melt_serve.train.data.packing import Batches, Packing
from melt_serve.train.data.records import BrokenRecord, DataError, checked
from tests.hub import running_hub
from tests.train.data.test_documents import MARKED, tokenizer

TOKENIZER = build_tokenizer()
ASKED, GIVEN = "Where is Ann?", "In Rome."
PLAIN = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": GIVEN}]
SYSTEM = [{"role": "system", "content": "Be short."}, *PLAIN]


def learnt(record, reads=TOKENIZER, **options):
    """Return the documents' tokens, and which are learnt."""
    documents = documents_of(record, reads, **options)
    return [(each.tokens.tolist(), each.supervised.tolist()) for each in documents]


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GIVEN}]}, PLAIN),
        ({"conversations": PLAIN}, PLAIN),
        ({"conversations": [{"from": "user", "value": ASKED}, {"from": "assistant", "value": GIVEN}]}, PLAIN),
        ({"prompt": ASKED, "completion": GIVEN}, PLAIN),
        ({"prompt": PLAIN[:1], "completion": PLAIN[1:]}, PLAIN),
        ({"instruction": ASKED, "output": GIVEN}, PLAIN),
        ({"instruction": ASKED, "input": "", "output": GIVEN}, PLAIN),
        (
            {"instruction": "Where", "input": "is Ann?", "output": GIVEN},
            [{**PLAIN[0], "content": "Where\n\nis Ann?"}, PLAIN[1]],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Where "}, "is Ann?"]}, PLAIN[1]]}, PLAIN),
        ({"messages": PLAIN, "text": "something else", "conversations": None}, PLAIN),
    ],
)
def test_every_form_gives_the_documents_of_the_plain_one(fields, plain):
    wanted = checked({"messages": plain}, "plain")
    record = checked(fields, "f.jsonl:1")
    assert record.chat == wanted.chat and record.fingerprint == wanted.fingerprint
    assert learnt(record) == learnt(wanted)


def test_a_system_prompt_beside_the_turns_comes_first():
    turns = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GIVEN}]
    for fields in ({"conversations": turns}, {"instruction": ASKED, "output": GIVEN}):
        assert checked({**fields, "system": "Be short."}, "").chat == SYSTEM


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ASKED}, "neither messages nor text: a record holds messages, conversations, prompt and completion"),
        ({"conversations": [{"from": ["x"], "value": "y"}]}, "messages.0.role"),
        ({"conversations": [{"value": "y"}]}, "messages.0.role: Field required"),
        ({"text": "a \ud800 b"}, "half a character"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "half a character"),
        ({"messages": [*PLAIN[:1], {**PLAIN[1], "weight": 3}]}, "messages.1.weight"),
    ],
)
def test_what_is_in_no_form_is_broken_and_says_which_there_are(fields, says):
    with pytest.raises(BrokenRecord, match=says):
        checked(fields, "f.jsonl:1")


@pytest.mark.parametrize("reads", [TOKENIZER, tokenizer(MARKED)], ids=["rendered", "marked"])
def test_replies_of_weight_0_and_all_but_the_last_are_not_learnt_where_that_is_asked_for(reads):
    first = [{"role": "user", "content": "Where is Bob?"}, {"role": "assistant", "content": "In Oslo."}]
    both = learnt(checked({"messages": [*first, *PLAIN]}, ""), reads)
    last = learnt(checked({"messages": [first[0], {**first[1], "weight": 0}, *PLAIN]}, ""), reads)
    assert last == learnt(checked({"messages": [*first, *PLAIN]}, ""), reads, learn="last") != both
    ((tokens, marks),) = last
    assert "Rome" in (said := reads.decode([token for token, each in zip(tokens, marks, strict=True) if each]))
    assert "Oslo" not in said and "Oslo" in reads.decode(tokens)
    with pytest.raises(BrokenRecord, match="nothing to learn"):
        learnt(checked({"messages": [PLAIN[0], {**PLAIN[1], "weight": 0}]}, ""), reads)


RECORDS = [{"text": f"Ann is in {place}."} for place in ("Rome", "Oslo", "Bern", "Cairo")]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
FILES = {
    "lines.jsonl": LINES.encode(),
    "lines.json": LINES.encode(),
    "array.json": json.dumps(RECORDS, indent=2).encode(),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "array.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
}


def epoch(files, **options):
    """Return the texts of an epoch in their order."""
    batches = Batches(Corpus(files), TOKENIZER, Packing(length=64, chunk_size=8, alone=True, **options))
    texts = []
    while batches.next_window():
        texts += [TOKENIZER.decode(pack[0].tokens, skip_special_tokens=True) for pack in batches.packs]
    return texts


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_batches_of_plain_lines(tmp_path, name, streaming):
    (tmp_path / "plain.jsonl").write_text(LINES)
    (tmp_path / name).write_bytes(FILES[name])
    assert epoch([tmp_path / name], streaming=streaming) == epoch([tmp_path / "plain.jsonl"], streaming=streaming)


def test_a_file_that_is_not_what_it_says_is_one_line(tmp_path):
    for name, content in (
        ("a.jsonl.gz", b"plain"),
        ("b.json.gz", gzip.compress(LINES.encode())[:20]),
        ("c.json", b"[1,"),
        ("d.jsonl.gz", gzip.compress(LINES.encode())[:10] + b"\x07" + LINES.encode()),
        ("e.json.gz", gzip.compress(b"[]")[:10] + b"\x07" + LINES.encode()),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.* (cannot be unpacked|is not JSON)"):
            Corpus([tmp_path / name])


def test_weights_say_how_often_an_epoch_takes_a_files_records(tmp_path):
    for name, place in (("a", "Rome"), ("b", "Oslo")):
        lines = [json.dumps({"text": f"{who} is in {place}."}) for who in ("Ann", "Bob", "Cat", "Dan")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    texts = epoch(files, weights=(2.5, 0.5))
    counts = {text: texts.count(text) for text in set(texts)}
    rome, oslo = ([count for text, count in counts.items() if place in text] for place in ("Rome", "Oslo"))
    assert sorted(rome) == [2, 2, 3, 3] and oslo == [1, 1]
    assert texts == epoch(files, weights=(2.5, 0.5)) != epoch(files, weights=(2.5, 0.5), seed=1)
    assert epoch(files, weights=(1, 1)) != [] and sorted(epoch(files, weights=(1, 1))) == sorted(epoch(files))


def test_a_split_of_a_dataset_on_the_hub_is_named_as_a_file(tmp_path):
    """In a process of its own: the library reads where the hub is when it is imported."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "train.jsonl").write_text(LINES)
    (dataset / "test.jsonl").write_text(json.dumps({"text": "Bob is in Lima."}) + "\n")
    script = """
from melt_serve.train.data.datasets import Corpus
from melt_serve.train.data.records import DataError
corpus = Corpus(["acme/places-2.5", "acme/places-2.5@main:test", "acme/places-2.5:train[:50%]"])
print([corpus.read(number).text for number in range(len(corpus))])
for name in ("acme/places-2.5:none", "acme/nowhere"):
    try:
        Corpus([name])
    except DataError as error:
        print(error)
"""
    with running_hub({"acme/places-2.5": dataset}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    texts, no_split, nowhere = ran.stdout.splitlines()
    assert texts == str([record["text"] for record in (*RECORDS, {"text": "Bob is in Lima."}, *RECORDS[:2])])
    assert no_split.startswith("acme/places-2.5 is no file here") and "'train', 'test'" in no_split
    assert nowhere.startswith("acme/nowhere is no file here")
