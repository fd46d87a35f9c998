"""Batches: what is learnt from, and that they depend on seed and number alone."""

from itertools import islice

import torch

from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.task.who_is_where import SENTENCES, questions
from melt_serve.train.data.batch import IGNORED
from melt_serve.train.data.task_batches import encode, training_batch


def test_labels_are_the_reply_and_its_end_mark():
    tokenizer = build_tokenizer()
    asked = list(islice(questions("train", 0), 5))
    batch = encode(asked, tokenizer)
    for question, labels, start in zip(asked, batch.labels, batch.prompt_lengths, strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == question.reply + tokenizer.eos_token
        assert (labels[:start] == IGNORED).all() and labels[start] != IGNORED


def test_the_token_before_a_reply_token_is_asked_for_it():
    batch = encode(list(islice(questions("train", 0), 5)), build_tokenizer())
    following = torch.roll(batch.input_ids, -1, dims=1)
    assert torch.equal(following[batch.before_reply], batch.replies[-1])
    assert batch.before_reply.sum() == (batch.labels != IGNORED).sum()


def test_every_loop_is_asked_for_what_it_can_know_and_the_last_for_all():
    tokenizer = build_tokenizer()
    asked = list(islice(questions("train", 0), 5))
    batch = encode(asked, tokenizer)

    def tokens(steps):
        return [token for question in asked for token in tokenizer.encode(question.reply_within(steps) + "<|im_end|>")]

    for loops, steps in ((1, [3]), (2, [0, 3]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 3, 3])):
        assert batch.reply_by_loop(loops).tolist() == [tokens(within) for within in steps]
    assert torch.equal(batch.reply_by_loop(1)[0], batch.replies[-1])
    assert len({tuple(reply) for reply in batch.replies.tolist()}) == 4


def test_a_batch_is_a_function_of_seed_and_number():
    tokenizer = build_tokenizer()
    batches = [training_batch(tokenizer, 3, seed, number).input_ids for seed in (0, 1) for number in (0, 1)]
    again = [training_batch(tokenizer, 3, seed, number).input_ids for seed in (0, 1) for number in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 4


def test_stories_of_every_length_are_seen():
    tokenizer = build_tokenizer()
    batches = [training_batch(tokenizer, 1, 0, number, ["aloud"]) for number in range(400)]
    lengths = [int(batch.prompt_lengths[0]) for batch in batches]
    assert len(set(lengths)) == SENTENCES - 1
    assert lengths.count(max(lengths)) > 2 * lengths.count(min(lengths))
