"""Packs: nothing is lost or doubled, and a stream goes on bit for bit, for any number of ranks."""

import json
import random
import threading
from concurrent.futures import CancelledError
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from melt_serve.bundled import MELT
from melt_serve.train.data.batch import IGNORED
from melt_serve.train.data.datasets import Corpus
from melt_serve.train.data.packing import Batches, Packing, best_fit
from melt_serve.train.data.records import BrokenRecord, DataError

RECORDS = 60
WORDS = ("Ann", "Ben", "Rome", "Oslo", "is", "in", "with", "Find")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MELT)


def texts(count: int = RECORDS) -> list[str]:
    """Of different lengths, and each with its own number."""
    draw = random.Random(0)
    return [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for number in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write the same records as two JSONL files, a saved dataset and a Parquet file."""
    import datasets

    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text}) + "\n" for text in texts()]
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl").write_text("\n" + "".join(lines[20:]).rstrip("\n"))
    table = datasets.Dataset.from_dict({"text": texts()})
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "c.parquet")
    return {
        "jsonl": [folder / "a.jsonl", folder / "b.jsonl"],
        "saved": [folder / "saved"],
        "parquet": [folder / "c.parquet"],
    }


def packing(**changed) -> Packing:
    return Packing(**{"length": 100, "chunk_size": 8, "batch": 4, "window": 16, **changed})


def same(one, other) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "attention_mask", "labels", "document_starts")
    )


def epoch_texts(batches: Batches, tokenizer) -> list[str]:
    """Return the texts of the documents of one epoch, in their order."""
    found = []
    while batches.next_window():
        found += [tokenizer.decode(document.tokens) for pack in batches.packs for document in pack]
    return [text.removesuffix("<|im_end|>") for text in found]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "saved", "parquet"])
def test_an_epoch_has_every_record_once_in_an_order_of_its_own(files, tokenizer, kind, streaming):
    batches = Batches(Corpus(files[kind]), tokenizer, packing(streaming=streaming))
    first, second = epoch_texts(batches, tokenizer), epoch_texts(batches, tokenizer)
    assert sorted(first) == sorted(second) == sorted(texts())
    assert first != second != texts()
    other = epoch_texts(Batches(Corpus(files[kind]), tokenizer, packing(streaming=streaming, seed=1)), tokenizer)
    assert sorted(other) == sorted(first) and other != first
    assert epoch_texts(Batches(Corpus(files[kind]), tokenizer, packing(streaming=streaming)), tokenizer) == first


def test_without_streaming_the_order_does_not_depend_on_the_kind_of_file(files, tokenizer):
    streams = [Batches(Corpus(paths), tokenizer, packing()) for paths in files.values()]
    for _ in range(6):
        first, *others = map(next, streams)
        assert all(same(first, other) for other in others)


def test_a_batch_says_where_its_documents_are(files, tokenizer):
    batches = Batches(Corpus(files["jsonl"]), tokenizer, packing())
    wanted = {tuple(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in texts()}
    for batch in islice(batches, 4):
        assert batch.input_ids.shape == (4, 100)
        for ids, labels, real, starts in zip(
            batch.input_ids, batch.labels, batch.real, batch.document_starts, strict=True
        ):
            for start in starts[real].unique().tolist():
                here = real & (starts == start)
                document = tuple(ids[here].tolist())
                assert document in wanted and start % 8 == 0 and here.nonzero()[0] == start
                assert labels[here].tolist() == [IGNORED, *document[1:]]
        assert (batch.labels[~batch.real] == IGNORED).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_stream_goes_on_bit_for_bit(files, tokenizer, streaming):
    """From every place in two epochs, within windows and between them."""
    stream = Batches(Corpus(files["jsonl"]), tokenizer, packing(streaming=streaming))
    states, batches = [], []
    while stream.epoch < 2:
        states.append(json.dumps(stream.state_dict()))
        batches.append(next(stream))
    assert max(map(len, states)) < 1000
    for number in range(len(states) - 1):
        again = Batches(Corpus(files["jsonl"]), tokenizer, packing(streaming=streaming))
        again.load_state_dict(json.loads(states[number]))
        assert json.dumps(again.state_dict()) == states[number]
        assert all(same(next(again), wanted) for wanted in batches[number : number + 3])
    assert again.counts == stream.counts


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_do_not_depend_on_the_number_of_ranks(files, tokenizer, streaming):
    """And a state that two ranks saved is gone on with by one."""

    def stream(rank: int = 0, world_size: int = 1) -> Batches:
        return Batches(Corpus(files["jsonl"]), tokenizer, packing(streaming=streaming), rank, world_size)

    alone, ranks = stream(), [stream(rank, 2) for rank in range(2)]
    for _ in range(5):
        whole, halves = next(alone), [next(each) for each in ranks]
        assert all(torch.equal(half.input_ids, whole.input_ids[rank::2]) for rank, half in enumerate(halves))
    assert ranks[0].state_dict() == ranks[1].state_dict() == alone.state_dict()
    again = stream()
    again.load_state_dict(ranks[1].state_dict())
    assert same(next(again), next(alone))


def test_a_state_of_other_data_is_refused(files, tokenizer):
    state = Batches(Corpus(files["jsonl"]), tokenizer, packing()).state_dict()
    with pytest.raises(DataError, match="files differ"):
        Batches(Corpus(files["saved"]), tokenizer, packing()).load_state_dict(state)
    with pytest.raises(DataError, match="chunk_size, seed differ"):
        Batches(Corpus(files["jsonl"]), tokenizer, packing(seed=3, chunk_size=16)).load_state_dict(state)


def test_a_batch_that_ranks_cannot_share_is_refused(files, tokenizer):
    with pytest.raises(DataError, match="4 packs cannot be shared evenly by 3 ranks"):
        Batches(Corpus(files["jsonl"]), tokenizer, packing(), rank=0, world_size=3)


BROKEN = {
    3: ("{never closed", "not JSON"),
    4: ('{"prompt": "x"}', "neither messages nor text"),
    6: ('{"messages": [{"content": "x"}]}', "messages.0.role: Field required"),
    7: ('{"text": 5}', "text: Input should be a valid string"),
    8: ('["text"]', "not a JSON object"),
    9: ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
}


@pytest.fixture
def broken_file(tmp_path):
    """Line 5 is blank, which is no mistake."""
    good = json.dumps({"text": "Ann is in Rome."})
    lines = [BROKEN[number][0] if number in BROKEN else "" if number == 5 else good for number in range(1, 12)]
    path = tmp_path / "broken.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_lines_are_named_counted_and_skipped(broken_file, tokenizer, streaming):
    said = []
    batches = Batches(
        Corpus([broken_file]),
        tokenizer,
        packing(streaming=streaming, broken="skip"),
        report=lambda b: said.append(str(b)),
    )
    assert epoch_texts(batches, tokenizer) == ["Ann is in Rome."] * 4
    assert batches.counts.records == 11 and batches.counts.broken == len(said) == 7
    for number, (_, why) in {**BROKEN, 12: ("", "not JSON")}.items():
        assert any(f"broken.jsonl:{number}: " in line and why in line for line in said), (number, said)


def test_a_broken_line_is_fatal_if_asked_and_can_be_skipped_later(broken_file, tokenizer):
    with pytest.raises(BrokenRecord, match=r"broken\.jsonl:3: not JSON"):
        next(Batches(Corpus([broken_file]), tokenizer, packing(streaming=True, window=3)))
    chosen = {"streaming": True, "window": 2, "length": 16, "batch": 1}
    strict = Batches(Corpus([broken_file]), tokenizer, packing(**chosen))
    next(strict)
    state = strict.state_dict()
    with pytest.raises(BrokenRecord):
        list(islice(strict, 9))
    lenient = Batches(Corpus([broken_file]), tokenizer, packing(**chosen, broken="skip"))
    lenient.load_state_dict(strict.state_dict())
    assert strict.state_dict()["place"] == state["place"] and lenient.epoch == 0
    next(lenient)
    assert lenient.counts.broken > 0


ORDERS = ({}, {"streaming": True}, {"weights": (2, 0.5)}, {"window": 7, "alone": True}, {"window": 200})


@pytest.mark.parametrize("chosen", ORDERS, ids=str)
def test_windows_that_are_read_ahead_are_those_that_would_be_read(files, tokenizer, chosen):
    """Across epochs, and where a stream goes back."""
    plain, ahead = (Batches(Corpus(files["jsonl"]), tokenizer, packing(**chosen), ahead=each) for each in (False, True))
    states = []
    for one, other in islice(zip(plain, ahead, strict=True), 50):
        assert same(one, other) and ahead.state_dict() == plain.state_dict() and ahead.counts == plain.counts
        states.append(json.loads(json.dumps(ahead.state_dict())))
    assert plain.epoch > 1
    for state in (states[3], states[20]):
        plain.load_state_dict(state)
        ahead.load_state_dict(state)
        assert all(same(*both) for both in islice(zip(plain, ahead, strict=True), 9))


def test_the_next_window_is_read_in_a_thread_and_its_broken_line_ends_the_run_where_it_is_reached(
    broken_file, tokenizer
):
    chosen = {"streaming": True, "window": 2, "length": 16, "batch": 1}
    stream = Batches(Corpus([broken_file]), tokenizer, packing(**chosen), ahead=True)
    threads = []
    window = stream.order.window
    stream.order.window = lambda *place: threads.append(threading.current_thread()) or window(*place)
    next(stream)
    assert isinstance(stream.coming.exception(timeout=60), BrokenRecord)
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread() and len(threads) == 2
    assert len(list(islice(stream, len(stream.packs) - 1))) == len(stream.packs) - 1
    with pytest.raises(BrokenRecord, match=r"broken\.jsonl:3: not JSON"):
        next(stream)


def test_a_stream_that_is_closed_reads_no_further(files, tokenizer, monkeypatch):
    stream = Batches(Corpus(files["jsonl"]), tokenizer, packing(), ahead=True)
    reached, go_on, read = threading.Event(), threading.Event(), stream.documents_of

    def slowly(record, counts):
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go_on.wait(60)
        return read(record, counts)

    monkeypatch.setattr(stream, "documents_of", slowly)
    next(stream)
    assert reached.wait(60)
    closer = threading.Thread(target=stream.close)
    closer.start()
    while not stream.closed:
        pass
    go_on.set()
    closer.join(60)
    assert isinstance(stream.coming.exception(timeout=0), CancelledError)


def test_data_without_anything_to_learn_is_an_error_and_no_endless_search(tmp_path, tokenizer):
    path = tmp_path / "nothing.jsonl"
    path.write_text('{"a": 1}\n' * 40)
    with pytest.raises(DataError, match=r"nothing to learn in nothing\.jsonl"):
        next(Batches(Corpus([path]), tokenizer, packing(broken="skip")))


def test_files_of_no_known_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Corpus([tmp_path / "missing.jsonl"])
    (tmp_path / "data.csv").write_text("text\nx")
    with pytest.raises(DataError, match=r"data\.csv is none of"):
        Corpus([tmp_path / "data.csv"])
    with pytest.raises(DataError, match="cannot be read as a Hugging Face dataset"):
        Corpus([tmp_path])


def test_a_stream_reads_no_more_than_it_needs(tmp_path, tokenizer):
    """The file ends a terabyte later: whoever looked for its end would not come back."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "Ann is in Rome."}) + "\n")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    corpus = Corpus([path])
    record, place = next(corpus.stream([]))
    assert record.text == "Ann is in Rome." and place == [0, len(json.dumps({"text": "Ann is in Rome."})) + 1, 1]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 40))
def test_packs_hold_every_document_once_on_the_grid(lengths, grid):
    packs = best_fit(lengths, 100, grid)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    for pack in packs:
        *before, last = [lengths[number] for number in pack]
        assert sum(-(-length // grid) * grid for length in before) + last <= 100


def test_packs_are_full():
    """Of many short documents at most the last pack has room for another."""
    draw = random.Random(0)
    lengths = [draw.randint(50, 2000) for _ in range(1000)]
    packs = best_fit(lengths, 10_000, 64)
    least = sum(-(-length // 64) * 64 for length in lengths) / 10_000
    assert len(packs) <= 1.01 * least + 1
