"""What is refused of a request's body before vLLM reads it: what would else end in an error of the server's.

vLLM's own models say what each route takes, and most mistakes are theirs to tell. These are the others: values that no
engine can be sent, whatever their field is, and fields whose type vLLM does not check.
"""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Self

from annotated_types import MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.types import Scope

from melt_serve.api.limits import Limits
from melt_serve.api.schemas import find_endless, schemas_of

MOST_NESTED = 100
"""Objects and arrays in each other. What parses, validates and copies a body behind us recurses."""
INTEGERS = range(-(2**63), 2**64)
"""What goes to the engine in one piece: MessagePack knows no other integers."""
LONGEST_NAME = 100
"""Characters of a field's name in a message; the client chose it."""
PRIORITY = "X-Vllm-Priority"
"""The header that overrides a body's priority. vLLM notes a request before it sends it to the engine: one that
it cannot send counts as running for ever."""


def find_mistake(scope: Scope, body: bytes, max_items: int = Limits().max_items) -> str | None:
    """Return what is wrong with a request's body, or its priority, with the field's name, or None."""
    if priority_of(Headers(scope=scope)) not in INTEGERS:
        return f"{PRIORITY} is an integer of more than 64 bits"
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if not body or not (path in ROUTES or "json" in Headers(scope=scope).get("content-type", "")):
        return None
    try:
        value = json.loads(body, parse_constant=refuse_constant)
        check_values(value, max_items)
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        return f"The body is no JSON that this server takes: {error}"
    if path not in ROUTES and not isinstance(value, dict):
        return None
    try:
        ROUTES.get(path, Body).model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{field_name(first['loc'])}: {first['msg']}"
    for field, schema in schemas_of(value):
        if reference := find_endless(schema):
            return f"{field_name([field])}: $ref {field_name([reference])} leads back to itself with no value between"
    if (answers := answers_asked(value)) > max_items:
        return f"This asks for {answers} answers, prompts times n, and {at_most(max_items)}"
    return None


def priority_of(headers: Headers) -> int:
    """Return the number that vLLM reads from the header; 0 if it reads none."""
    try:
        return int(headers.get(PRIORITY, "0"))
    except ValueError:
        return 0


def answers_asked(body: dict[str, Any]) -> int:
    """Return how many answers a request asks for: to each of its prompts or chats, n."""
    lists = [body[name] for name in ("prompt", "messages") if isinstance(body.get(name), list)]
    prompts = [len(each) for each in lists if each and isinstance(each[0], str | list)]
    return max(prompts, default=1) * (n if isinstance(n := body.get("n"), int) else 1)


def at_most(max_items: int) -> str:
    """Return what this server takes, and what to do."""
    return f"this server takes {max_items}: send fewer at once, or start it with a higher --max-items"


TOO_DEEP = f"More than {MOST_NESTED} objects and arrays in each other."


def refuse_constant(name: str) -> None:
    """Raise ValueError: NaN and Infinity are no JSON, though Python's parser takes them."""
    raise ValueError(f"{name} is no number; leave the field out instead")


def check_values(body: Any, max_items: int) -> None:
    """Check what a body holds, in any field.

    Raises:
        ValueError: nesting, a number or a string that cannot be passed on, or an array of more members than
            `max_items`, of which vLLM copies, renders or searches each; the message names the field.
    """
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), body)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            check_text(path, value)
            members: Iterable[tuple[Any, Any]] = value.items()
        elif not isinstance(value, list):
            check_number(path, value)
            continue
        else:
            members = enumerate(value)
            kinds = set(map(type, value))
            if kinds == {int}:  # token ids: as many as a body has room for
                members = [(value.index(each), each) for each in (min(value), max(value))]
            elif len(value) > max_items:
                raise ValueError(f"{field_name(path)} has {len(value)} members, and {at_most(max_items)}")
            elif kinds == {str}:
                check_text(path, value)
                continue
        if len(path) == MOST_NESTED:
            raise ValueError(TOO_DEEP)
        for name, member in members:
            if isinstance(member, str):
                check_text((*path, name), [member])
            elif isinstance(member, dict | list | int | float):
                waiting.append(((*path, name), member))


def check_number(path: tuple[Any, ...], value: Any) -> None:
    """Raise ValueError if a number is not finite, or an integer of more than 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field_name(path)} is too large a number")
    if isinstance(value, int) and value not in INTEGERS:
        raise ValueError(f"{field_name(path)} is an integer of more than 64 bits")


def check_text(path: tuple[Any, ...], texts: Iterable[str]) -> None:
    """Raise ValueError if a text, or an object's name, is not Unicode."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field_name(path)} has half of a surrogate pair, which is no Unicode") from None


def field_name(path: Iterable[Any]) -> str:
    """Return a field's name as a client would write it, cut to a length."""
    name = ".".join(str(part) for part in path) or "the body"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def refused(why: str) -> AfterValidator:
    """Make a validator that refuses every value but null."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise PydanticCustomError("refused", why)  # type: ignore[arg-type]

    return AfterValidator(refuse)


def no_boolean(value: Any) -> Any:
    """Refuse what vLLM would take for 0 or 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "must be a number or a text, not true or false")
    return value


Internal = Annotated[Any, refused("is for servers among themselves, not for clients")]
NoDepth = Annotated[Any, refused("this route runs at the server's default depth and takes no other")]
EffortElsewhere = Annotated[Any, refused("in Anthropic's API the effort is output_config.effort")]


def no_internal_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """Refuse names under which vLLM's servers talk to each other."""
    for name in ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"):
        if name in arguments:
            raise PydanticCustomError("internal", "{name} is for servers among themselves", {"name": name})
    return arguments


def no_switch(arguments: Any) -> Any:
    """Leave out the one argument that is true or false; the engine says what else it may not be."""
    if not isinstance(arguments, dict):
        return arguments
    return {name: value for name, value in arguments.items() if name != "return_loops"}


Arguments = Annotated[
    dict[str, Annotated[Any, AfterValidator(no_boolean)]], BeforeValidator(no_switch), AfterValidator(no_internal_names)
]


class Body(BaseModel):
    """What no route takes."""

    model_config = ConfigDict(strict=True)

    kv_transfer_params: Internal = None
    ec_transfer_params: Internal = None
    vllm_xargs: Arguments | None = None


class Generation(Body):
    """Fields of the routes that generate whose type vLLM does not check, or not in time."""

    structured_outputs: dict[str, Any] | None = None
    use_beam_search: Any = None
    reasoning_effort: Any = None
    reasoning: Any = None

    @model_validator(mode="after")
    def check_beams(self) -> Self:
        """See that beams are asked nothing that vLLM does not hand on to them."""
        if self.use_beam_search and (
            self.vllm_xargs or self.reasoning_effort is not None or self.reasoning is not None
        ):
            raise PydanticCustomError(
                "beams",
                "use_beam_search: beams run at the server's default depth, without vllm_xargs and reasoning effort; "
                "use n with temperature instead",
            )
        return self


class Message(Generation):
    """Anthropic's, which ignores fields it does not know."""

    messages: Annotated[list[Any], MinLen(1)] | None = None
    reasoning_effort: EffortElsewhere = None


class Scoring(Body):
    """Of routes that read the likelihood of a next token."""

    vllm_xargs: NoDepth = None
    reasoning_effort: NoDepth = None


class Sampling(BaseModel):
    """vLLM's own parameters, as `/inference/v1/generate` takes them."""

    model_config = ConfigDict(strict=True)

    extra_args: Arguments | None = None


class Tokens(Body):
    """Of the route that takes and gives tokens."""

    sampling_params: Sampling | None = None


class Abort(Body):
    """Of the routes that end other requests, which look at their ids too late."""

    request_ids: list[str] | str | None = None


class Scaling(Body):
    """Of the route that changes how many engines share a model's experts, which vLLM has for every model."""

    new_data_parallel_size: Annotated[Any, refused("no looped model has experts")] = None


ROUTES: dict[str, type[Body]] = {
    "/abort_requests": Abort,
    "/generative_scoring": Scoring,
    "/inference/v1/abort_requests": Abort,
    "/inference/v1/generate": Tokens,
    "/invocations": Generation,
    "/scale_elastic_ep": Scaling,
    "/v1/chat/completions": Generation,
    "/v1/chat/completions/batch": Generation,
    "/v1/chat/completions/render": Generation,
    "/v1/completions": Generation,
    "/v1/completions/render": Generation,
    "/v1/messages": Message,
    "/v1/messages/count_tokens": Message,
    "/v1/messages/render": Message,
    "/v1/responses": Generation,
    "/v1/responses/render": Generation,
    "/v1/systemone": Scoring,
}
"""The routes whose bodies are objects with more to check than those of all others."""
