"""What is seen of a server under load: requests, and moments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """One request as its user saw it.

    Attributes:
        start: seconds since the run began.
        loops: that it asked for; of a LoopLM, the server's.
        first: seconds to its first token.
        seconds: to its last.
        tokens: of the answer.
        right: whether it was the right answer.
        error: None if it went well.
    """

    start: float
    loops: int
    first: float
    seconds: float
    tokens: int
    right: bool
    error: str | None = None

    @property
    def seconds_per_token(self) -> float:
        """Mean seconds of a token after the first."""
        return (self.seconds - self.first) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Sample:
    """What the server and its processes showed at one moment.

    Attributes:
        at: seconds since the run began.
        step: number of the scenario's step.
        users: locust's, at this moment.
        memory: bytes that the whole process tree has written (its libraries not counted); pages that processes
            share count once.
        kv_in_use: bytes of KV blocks that running requests hold: `vllm:kv_cache_usage_perc` of the cache, which both
            kinds of model report.
        kv_looplm: what a LoopLM would hold for the same tokens (MELT only).
        kv_bytes_per_token: of one token's rows, by the server.
        generated: tokens so far.
        preemptions: so far.
    """

    at: float
    step: int
    users: int
    memory: int
    kv_in_use: float
    kv_looplm: float
    kv_bytes_per_token: float
    running: float
    waiting: float
    generated: float
    preemptions: float
