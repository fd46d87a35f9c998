"""Batches: what is learnt from, and that they depend on seed and number alone."""

from itertools import islice

import torch

from melt_serve.train.data import IGNORED, encode, training_batch
from melt_serve.train.tasks import SENTENCES, questions
from melt_serve.train.tokenizer import build_tokenizer


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
    assert torch.equal(following[batch.before_reply], batch.reply)
    assert batch.before_reply.sum() == (batch.labels != IGNORED).sum()


def test_a_batch_is_a_function_of_seed_and_number():
    tokenizer = build_tokenizer()
    batches = [training_batch(tokenizer, 3, seed, number).input_ids for seed in (0, 1) for number in (0, 1)]
    again = [training_batch(tokenizer, 3, seed, number).input_ids for seed in (0, 1) for number in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 4


def test_stories_of_every_length_are_seen():
    tokenizer = build_tokenizer()
    lengths = [int(training_batch(tokenizer, 1, 0, number).prompt_lengths[0]) for number in range(400)]
    assert len(set(lengths)) == SENTENCES - 1
    assert lengths.count(max(lengths)) > 2 * lengths.count(min(lengths))
