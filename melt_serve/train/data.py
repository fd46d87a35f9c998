"""Batches of tokens, and the bundled task's: a function of seed and number, so a run can go on anywhere."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from melt_serve.train.tasks import KINDS, SENTENCES, SILENT_STEPS, Kind, Question, questions

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """B chats, right-padded; or B packs of documents.

    Attributes:
        input_ids, attention_mask: [B, S].
        labels: [B, S], the token itself where it belongs to the reply or its end mark, else -100; in packs also
            -100 where a document begins, because the token before it is another's.
        prompt_lengths: [B], tokens before the reply; not of packs.
        replies: of the bundled task, [SILENT_STEPS + 1, tokens], row i the replies within i steps, in the order of
            `before_reply`.
        document_starts: of packs, [B, S], the column where each token's document begins.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_lengths: Tensor | None = None
    replies: Tensor | None = None
    document_starts: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """[B, S], true where there is a token."""
        return self.attention_mask.bool()

    @property
    def before_reply(self) -> Tensor:
        """[B, S], true where the next token is one of the reply."""
        return torch.nn.functional.pad(self.labels[:, 1:] != IGNORED, (0, 1))

    def reply_by_loop(self, loops: int) -> Tensor:
        """[T, tokens], what each loop is to answer: loop t the reply within t - 1 steps, the last loop all of it."""
        assert self.replies is not None
        within = torch.arange(loops).clamp(max=SILENT_STEPS)
        within[-1] = SILENT_STEPS
        return self.replies[within]


def training_batch(
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    seed: int,
    number: int,
    kinds: Sequence[Kind] = KINDS,
) -> Batch:
    """Batch `number` of a run: questions of one random length, longer ones drawn more often."""
    lengths = range(2, SENTENCES + 1)
    sentences = random.Random(f"length {seed} {number}").choices(lengths, weights=lengths)[0]
    return encode(list(islice(questions("train", f"{seed} {number}", sentences, kinds), size)), tokenizer)


def encode(asked: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Questions with their replies; labels on the replies and the end mark only."""
    prompts = [prompt_ids(question, tokenizer) for question in asked]
    replies = [tokenizer.encode(question.reply + tokenizer.eos_token) for question in asked]
    rows = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    labels = [torch.tensor([IGNORED] * len(prompt) + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    within = [
        [token for question in asked for token in tokenizer.encode(question.reply_within(steps) + tokenizer.eos_token)]
        for steps in range(SILENT_STEPS + 1)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        input_ids=pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        attention_mask=pad([torch.ones_like(row) for row in rows], batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=IGNORED),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        replies=torch.tensor(within),
    )


def prompt_ids(question: Question, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The question through the chat template, ready for the assistant to speak."""
    messages = [{"role": "user", "content": question.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
