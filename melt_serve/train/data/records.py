"""A record to learn from: a chat or a text, in any of the forms that people have them in.

A chat is `messages`, with optional `tools`; all other forms are turned into it:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    {"prompt": "...", "completion": "..."}            both text, or both lists of messages
    {"instruction": "...", "input": "...", "output": "..."}     `input` and `system` may be missing

The content of a message is text, or a list of parts; what a part that is no text means, is the chat template's to say.
`"weight": 0` in a message of the assistant leaves the reply out of what is learnt. Where a record has several of these,
the first in this order counts; `text` comes last.
"""

from hashlib import blake2b
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "function_call": "assistant"}
"""Speakers of `conversations` by another name than that of their role."""
FORMS = "messages, conversations, prompt and completion, instruction and output, or text"


class DataError(ValueError):
    """The data cannot be used as asked; the message says why."""


class BrokenRecord(DataError):
    """One record cannot be learnt from; the message says which, by file and line, and why."""


class Message(BaseModel):
    """A message of a chat; what else it holds is the chat template's business.

    Attributes:
        weight: 0 where a reply is not to be learnt.
    """

    model_config = ConfigDict(extra="allow")
    role: str
    weight: int | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def join_parts(self) -> "Message":
        """Make one text of a content that is a list of texts, as templates for text take it."""
        content = (self.model_extra or {}).get("content")
        if isinstance(content, list) and (text := text_of(content)) is not None:
            self.model_extra["content"] = text  # type: ignore[index]
        return self


class Record(BaseModel):
    """A chat or a text.

    Attributes:
        place: file and line, or number in the table.
        fingerprint: of the content, the same wherever it stands.
    """

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    place: str = ""
    _fingerprint: bytes = PrivateAttr(b"")

    @model_validator(mode="after")
    def check(self) -> "Record":
        """See that the record holds something to learn from."""
        if not self.messages and not self.text:
            raise ValueError(f"it has neither messages nor text: a record holds {FORMS}")
        try:
            content = self.model_dump_json(exclude={"place"}, exclude_none=True)
        except (PydanticSerializationError, UnicodeEncodeError):
            raise ValueError("it holds half a character (a lone surrogate, such as \\ud800)") from None
        self._fingerprint = blake2b(content.encode(), digest_size=16).digest()
        return self

    @property
    def fingerprint(self) -> bytes:
        """A checksum of what the record holds."""
        return self._fingerprint

    @property
    def chat(self) -> list[dict[str, Any]] | None:
        """The messages as chat templates take them: fields that a table had to fill with None are left out."""
        if not self.messages:
            return None
        return [message.model_dump(exclude_none=True, exclude={"weight"}) for message in self.messages]

    @property
    def unlearnt(self) -> set[int]:
        """The numbers of the messages that are not to be learnt."""
        return {number for number, message in enumerate(self.messages or []) if message.weight == 0}


def checked(fields: object, place: str) -> Record:
    """Validate one record, in whatever form it is.

    Raises:
        BrokenRecord: says in one line what it lacks.
    """
    if not isinstance(fields, dict):
        raise BrokenRecord(f"{place}: not a JSON object")
    try:
        return Record.model_validate({**as_messages(fields), "place": place})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        says = first["msg"].removeprefix("Value error, ")
        raise BrokenRecord(f"{place}: {where + ': ' if where else ''}{says}") from None


def as_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a record's fields in the plain form; what is in none of the forms is returned as it is."""
    if fields.get("messages"):
        return {"messages": fields["messages"], "tools": fields.get("tools")}
    match fields:
        case {"conversations": [*turns]} if turns:
            chat = [turn_of(turn) for turn in turns]
        case {"prompt": [*asked], "completion": [*given]}:
            chat = [*asked, *given]
        case {"prompt": str(asked), "completion": str(given)}:
            chat = question(asked, given)
        case {"instruction": str(asked), "output": str(given)}:
            more = fields.get("input")
            chat = question(f"{asked}\n\n{more}" if more else asked, given)
        case _:
            return fields
    if isinstance(system := fields.get("system"), str) and system:
        chat.insert(0, {"role": "system", "content": system})
    return {"messages": chat, "tools": fields.get("tools")}


def turn_of(turn: object) -> object:
    """Return a turn of `conversations` as a message."""
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}


def question(asked: str, given: str) -> list[object]:
    """Return a question and its answer as a chat."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": given}]


def text_of(parts: list[object]) -> str | None:
    """Return the text of a content in parts; None where one of them is none."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
