"""A run's sequences are the same whenever they are asked for, and what was read once is not read again."""

import pytest
import torch

from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.train.data.batch import IGNORED
from melt_serve.train.data.sequences import INDEX, Sequences
from melt_serve.train.recipe_files import load_recipe
from tests.train.tiny_run import prepare

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


def open_sequences(recipe_file, folder, *words):
    return Sequences(load_recipe(str(recipe_file), ["data.window=3", *words]), TOKENIZER, folder)


def same(one, other):
    tensors = [tensor for tensor in vars(one) if isinstance(getattr(one, tensor), torch.Tensor)]
    return all(torch.equal(getattr(one, each), getattr(other, each)) for each in tensors)


@pytest.mark.parametrize("pack", ["true", "false"])
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_step_gets_the_same_sequences_in_any_order_of_asking(recipe_file, tmp_path, pack, streaming):
    words = (f"data.pack={pack}", f"data.streaming={streaming}")
    sequences = open_sequences(recipe_file, tmp_path, *words)
    asked = [range(number, number + 2) for number in (0, 2, 4, 10, 24)]
    batches = [sequences(numbers) for numbers in asked]
    assert not same(batches[0], batches[1])
    again = open_sequences(recipe_file, tmp_path, *words)  # a run that is resumed
    for place in (3, 0, 4, 2, 1):
        assert same(again(asked[place]), batches[place])


def test_a_resumed_run_reads_one_window_and_not_all_that_came_before(recipe_file, tmp_path):
    numbers = range(40, 42)
    batch = open_sequences(recipe_file, tmp_path)(numbers)
    lines = (tmp_path / INDEX).read_text().splitlines(keepends=True)
    (tmp_path / INDEX).write_text("".join(lines) + lines[-1][:20])  # killed while it wrote
    resumed = open_sequences(recipe_file, tmp_path)
    read = []
    resumed.stream.next_window = lambda *its, original=resumed.stream.next_window: read.append(1) or original(*its)
    assert same(resumed(numbers), batch) and len(lines) > 5 and len(read) <= 2
    resumed(range(80, 82))
    assert len(resumed.windows) > len(lines)
    assert [first for first, _ in open_sequences(recipe_file, tmp_path).windows] == [
        first for first, _ in resumed.windows
    ]


def test_alone_every_document_is_seen_once_an_epoch_in_an_order_of_the_seeds(recipe_file, tmp_path):
    def epoch(number, seed):
        words = ("data.pack=false", f"seed={seed}")
        batch = open_sequences(recipe_file, tmp_path / "none", *words)(range(10 * number, 10 * (number + 1)))
        return [tuple(ids[ids > 0].tolist()) for ids in batch.input_ids]

    one = epoch(0, 0)
    assert one == epoch(0, 0) and len(set(one)) == 10
    for other in (epoch(1, 0), epoch(0, 1)):
        assert other != one and set(other) == set(one)


def test_alone_only_replies_are_learnt_and_prompts_end_where_they_begin(recipe_file, tmp_path):
    batch = open_sequences(recipe_file, tmp_path, "data.pack=false")(range(10))
    assert batch.document_starts is None and batch.attention_mask.any(0).all()
    for ids, labels, start in zip(batch.input_ids, batch.labels, batch.prompt_lengths, strict=True):
        learnt = TOKENIZER.decode(labels[labels != IGNORED])
        assert learnt.startswith("<think>") if start > 1 else learnt.startswith(" is in Rome.")
        assert torch.equal(labels[labels != IGNORED], ids[start:][labels[start:] != IGNORED])
