"""What one client may take of the server; `melt-serve serve` has a flag for each limit."""

import os

from pydantic import BaseModel, PositiveFloat, PositiveInt

LAST_SECOND = 1.0
"""Seconds that a client has to take its last words, before its connection is closed under it."""
RETRY_SECONDS = 10
"""When a client of a stopping server should ask again: by then another one answers, or this one has started anew."""


class Limits(BaseModel):
    """What one request and one connection may take; each is set by the environment, `MELT_MAX_BODY_BYTES` and so on.

    Attributes:
        max_connections: that are open at a time, of each API process.
        max_header_bytes: of a request's line and headers.
        header_timeout: seconds until a new connection, or a request that has begun, has sent all its headers.
        max_body_bytes: of a request's body; vLLM limits a prompt's tokens (`--max-model-len`), but reads it first.
        max_items: members of an array in a body, unless they are token ids; and answers, which are prompts times n.
        body_timeout: seconds until the whole body must have arrived.
        request_timeout: seconds until the whole answer must have been taken by the client.
    """

    max_connections: PositiveInt = 4096
    max_header_bytes: PositiveInt = 32 << 10
    header_timeout: PositiveFloat = 10
    max_body_bytes: PositiveInt = 4 << 20
    max_items: PositiveInt = 2048
    body_timeout: PositiveFloat = 30
    request_timeout: PositiveFloat = 600

    @classmethod
    def from_environment(cls) -> "Limits":
        """Read the limits that are set; the others keep their defaults.

        Raises:
            ValidationError: pydantic's, which names the value that is no positive number.
        """
        names = {field: f"MELT_{field.upper()}" for field in cls.model_fields}
        return cls.model_validate({field: os.environ[name] for field, name in names.items() if name in os.environ})

    @property
    def max_request_bytes(self) -> int:
        """Bytes of a request on the wire: a body in chunks of one byte takes six times its size."""
        return self.max_header_bytes + 8 * self.max_body_bytes
