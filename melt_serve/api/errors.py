"""Errors in OpenAI's shape, whoever made them, and short whatever they quote."""

import json
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

LONGEST_MESSAGE = 2000
"""Characters: errors quote what is wrong, and that may be megabytes of a client's."""


def error_body(status: HTTPStatus, message: str) -> bytes:
    """Return an error of ours as JSON."""
    return json.dumps(create_error_response(shorten(message), status.phrase, status).model_dump()).encode()


def in_openai_shape(status: int, body: bytes, request: str) -> tuple[bytes, dict[str, Any]]:
    """Return an error's JSON with OpenAI's fields, and those fields.

    Args:
        body: the error as vLLM, FastAPI or Starlette wrote it; Anthropic's shape is left as it is.
        request: method and path, for errors that do not name what they are about.
    """
    try:
        answer = json.loads(body)
    except ValueError:
        answer = body.decode(errors="replace")
    if not (isinstance(answer, dict) and isinstance(answer.get("error"), dict)):
        if isinstance(answer, dict):
            answer = next((answer[name] for name in ("detail", "error", "message") if name in answer), None)
        answer = json.loads(error_body(HTTPStatus(status), f"{request}: {answer or HTTPStatus(status).phrase}"))
    error: dict[str, Any] = answer["error"]
    for field, value in error.items():
        if isinstance(value, str):
            error[field] = shorten(value)
    return json.dumps(answer).encode(), error


def shorten(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Cut a text that is longer than `most` characters, and say so."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
