"""Whose turn it is when a prompt's chunk does not fit beside the decodes."""

from dataclasses import dataclass

PATIENCE = 4
"""Steps a prompt waits for a budget that running requests use up, before it has a turn ahead of them."""


@dataclass
class Turn:
    """A prompt that decodes have kept waiting: `tokens` of a step's budget are kept for `request_id`."""

    request_id: str
    tokens: int
    steps_waited: int
