"""Where the sequences of a post-training come from."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from melt_serve.train.data import IGNORED, Batch
from melt_serve.train.recipe import PostTraining

Sequences = Callable[[range], Batch]
"""The sequences of a run with these numbers, as a batch: the same for the same numbers, whenever they are asked for."""


class DataError(ValueError):
    """The data cannot be learnt from; the message names file, line and remedy."""


def open_sequences(recipe: PostTraining, tokenizer: PreTrainedTokenizerFast) -> Sequences:
    """The recipe's data: a document a sequence, in an order that is drawn anew for every epoch.

    Raises:
        DataError: a file that is missing or empty, or a line that is no document. Before anything is trained.
    """
    documents = [document for file in recipe.data.files for document in read_documents(Path(file), tokenizer)]

    @cache
    def order(epoch: int) -> list[int]:
        return random.Random(f"order {recipe.seed} {epoch}").sample(range(len(documents)), len(documents))

    def sequences(numbers: range) -> Batch:
        places = (divmod(number, len(documents)) for number in numbers)
        chosen = [documents[order(epoch)[place]] for epoch, place in places]
        return pad([encode(*document, tokenizer, recipe.sequence_length) for document in chosen])

    return sequences


def read_documents(path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """What is given and what is to be learnt of every line, as text."""
    if not path.is_file():
        raise DataError(f"data.files: there is no file {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise DataError(f"data.files: {path} is empty")
    for number, line in enumerate(lines, 1):
        try:
            yield read_document(json.loads(line), tokenizer)
        except (ValueError, KeyError, TypeError, TemplateError) as error:
            raise DataError(f"{path}, line {number}: {error}; mend or remove it") from None


def read_document(row: dict, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """A chat up to the assistant's last message, and that message; or nothing, and a text."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return "", row["text"] + (tokenizer.eos_token or "")
    messages = row.get("messages") if isinstance(row, dict) else None
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("neither `text` nor `messages` that end with the assistant's")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not continue the prompt with the reply")
    return prompt, whole.removeprefix(prompt)


def encode(prompt: str, reply: str, tokenizer: PreTrainedTokenizerFast, longest: int) -> tuple[list[int], list[int]]:
    """Tokens and labels, cut at `longest`."""
    given = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    learnt = tokenizer.encode(reply, add_special_tokens=False)
    return (given + learnt)[:longest], ([IGNORED] * len(given) + learnt)[:longest]


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Sequences as a batch, padded on the right."""
    ids = [torch.tensor(tokens) for tokens, _ in rows]
    labels = pad_sequence([torch.tensor(each) for _, each in rows], batch_first=True, padding_value=IGNORED)
    return Batch(
        input_ids=pad_sequence(ids, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        labels=labels,
        prompt_lengths=(labels != IGNORED).int().argmax(-1),
        replies=labels[labels != IGNORED][None],
    )
