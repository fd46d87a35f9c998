"""Batches of the bundled task: a function of seed and number, so a run can go on anywhere."""

import random
from collections.abc import Sequence
from itertools import islice

import torch
from transformers import PreTrainedTokenizerFast

from melt_serve.task.tokenizer import prompt_ids
from melt_serve.task.who_is_where import KINDS, SENTENCES, SILENT_STEPS, Kind, Question, questions
from melt_serve.train.data.batch import IGNORED, Batch


def training_batch(
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    seed: int,
    number: int,
    kinds: Sequence[Kind] = KINDS,
) -> Batch:
    """Draw batch `number` of a run: questions of one random length, longer ones drawn more often."""
    lengths = range(2, SENTENCES + 1)
    sentences = random.Random(f"length {seed} {number}").choices(lengths, weights=lengths)[0]
    return encode(list(islice(questions("train", f"{seed} {number}", sentences, kinds), size)), tokenizer)


def encode(asked: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Tokenize questions with their replies; labels are on the replies and the end marks only."""
    prompts = [prompt_ids(question, tokenizer) for question in asked]
    replies = [tokenizer.encode(question.reply + tokenizer.eos_token) for question in asked]
    sequences = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    labels = [torch.tensor([IGNORED] * len(prompt) + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    within = [
        [token for question in asked for token in tokenizer.encode(question.reply_within(steps) + tokenizer.eos_token)]
        for steps in range(SILENT_STEPS + 1)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        input_ids=pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
        attention_mask=pad([torch.ones_like(each) for each in sequences], batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=IGNORED),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        replies=torch.tensor(within),
    )
