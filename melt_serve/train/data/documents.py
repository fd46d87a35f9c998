"""A record as tokens, with those marked that are to be learnt: the assistant's in a chat, all of a text."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from melt_serve.train.data.records import BrokenRecord, DataError, Record

TooLong = Literal["cut", "split", "drop"]
Learn = Literal["replies", "last"]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Document:
    """Tokens that are learnt from without looking at any other document.

    Attributes:
        tokens: [L], int32.
        supervised: [L], true for tokens whose prediction is learnt.
    """

    tokens: Tensor
    supervised: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Document":
        return Document(self.tokens[part], self.supervised[part])


def documents_of(record: Record, tokenizer: PreTrainedTokenizerFast, learn: Learn = "replies") -> list[Document]:
    """Tokenize a record into its documents.

    A text is one, all of it supervised, with an end mark if the tokenizer has one. A chat is one, the assistant's
    replies and their end marks supervised: as the chat template's `{% generation %}` marks say, or, without such,
    what it adds for a message to what it renders as the prompt before it. Where a template renders a reply
    in another way once the chat has gone on (reasoning is often left out), the chat becomes several documents, so that
    each reply is learnt after the prompt that will be there when it is to be given.

    Args:
        learn: of a chat, all replies but those of weight 0, or the last one only.

    Raises:
        BrokenRecord: it cannot be rendered, or has nothing to learn.
        DataError: a chat, but the tokenizer has no chat template.
    """
    chat = record.chat
    if chat is None:
        documents = [text_document(record.text or "", tokenizer)]
    elif not tokenizer.chat_template:
        raise DataError(f"{record.place}: a chat, but the tokenizer has no chat template")
    else:
        replies = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        learnt = set(replies if learn == "replies" else replies[-1:]) - record.unlearnt
        try:
            if GENERATION.search(template_of(tokenizer)):
                documents = [marked_document(chat, record.tools, tokenizer, [number in learnt for number in replies])]
            else:
                documents = [
                    spans_document(text, spans, tokenizer)
                    for text, spans in rendered_replies(chat, record.tools, tokenizer, learnt)
                ]
        except (TemplateError, TypeError, KeyError, UnrenderableReply) as error:
            says = " ".join(str(error).split())
            raise BrokenRecord(f"{record.place}: the chat template does not take it: {says}") from None
    documents = [document for document in documents if document.supervised[1:].any()]
    if not documents:
        raise BrokenRecord(f"{record.place}: nothing to learn: no reply of an assistant, or less than two tokens")
    return documents


def fitted(document: Document, length: int, too_long: TooLong) -> list[Document]:
    """Fit a document into so many tokens: its beginning (`cut`), all of it as several (`split`), or none (`drop`).

    Parts that supervise nothing are left out.
    """
    if len(document) <= length:
        return [document]
    if too_long == "drop":
        return []
    starts = range(0, len(document), length) if too_long == "split" else [0]
    parts = [document[start : start + length] for start in starts]
    return [part for part in parts if part.supervised[1:].any()]


class UnrenderableReply(ValueError):
    """A chat template does not begin a reply as it begins the prompt for one."""


def template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the template for plain chats, where a tokenizer has several."""
    return tokenizer.get_chat_template()


def text_document(text: str, tokenizer: PreTrainedTokenizerFast) -> Document:
    """Tokenize a text, all of it supervised, with an end mark if the tokenizer has one."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens = [*tokens, tokenizer.eos_token_id]
    return document_of(tokens, [True] * len(tokens))


def marked_document(
    chat: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerFast,
    learnt: list[bool],
) -> Document:
    """Tokenize a chat, supervised as the template's own marks say.

    Args:
        learnt: whether each reply is supervised.

    Raises:
        UnrenderableReply: some are not, and the template does not mark each reply once.
    """
    encoded = tokenizer.apply_chat_template(chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    marks = encoded["assistant_masks"]
    if not all(learnt):
        runs = [(marked, list(run)) for marked, run in groupby(marks)]
        if sum(marked for marked, _ in runs) != len(learnt):
            raise UnrenderableReply("it does not mark every reply apart, so single ones cannot be left out")
        of_reply = iter(learnt)
        marks = [each for marked, run in runs for each in (run if not marked or next(of_reply) else [0] * len(run))]
    return document_of(encoded["input_ids"], [bool(each) for each in marks])


def rendered_replies(
    chat: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerFast,
    learnt: Collection[int],
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield texts that hold every reply with a learnt number once as it is given, with where each begins and ends."""

    def render(messages: list[dict[str, Any]], **options: bool) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    replies = {}
    for number in sorted(learnt):
        if number:  # what nobody asked for is no reply
            prompt = render(chat[:number], add_generation_prompt=True)
            said = render(chat[: number + 1])
            if not said.startswith(prompt):
                raise UnrenderableReply(
                    f"message {number + 1} is not rendered as what add_generation_prompt begins; "
                    "give the template {% generation %} marks"
                )
            replies[number] = (prompt, said)
    while replies:
        _, whole = replies[max(replies)]
        given = {number: (prompt, said) for number, (prompt, said) in replies.items() if whole.startswith(said)}
        yield whole, [(len(prompt), reply_end(said, tokenizer)) for prompt, said in given.values()]
        replies = {number: reply for number, reply in replies.items() if number not in given}


def reply_end(said: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return where a reply's end mark ends: the white space that templates put after it is never generated."""
    stripped = said.rstrip()
    return len(stripped) if stripped.endswith(tuple(tokenizer.all_special_tokens)) else len(said)


def spans_document(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerFast) -> Document:
    """Tokenize a rendered chat; a token is supervised if all of it lies in one of the spans."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    supervised = [
        any(start <= first < last <= end for start, end in spans) for first, last in encoded["offset_mapping"]
    ]
    return document_of(encoded["input_ids"], supervised)


def document_of(tokens: list[int], supervised: list[bool]) -> Document:
    """Build a Document with int32 tokens and a bool mask."""
    return Document(torch.tensor(tokens, dtype=torch.int32), torch.tensor(supervised, dtype=torch.bool))
