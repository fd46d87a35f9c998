"""A checkpoint under test, and its server: started as its users start it, with a cache small enough to be filled."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from melt_serve.bundled import MELT
from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig, kv_bytes_per_token, on_grid
from melt_serve.server_process import free_port, running
from melt_serve.verify.client import Client, Depth

CPU_BLOCKS = 32, 128
"""The finest and the default KV block of vLLM's CPU attention, in tokens; a GPU's are smaller."""
ROOM = 12
"""Such blocks that the cache has at least: room for a few requests, and not for all."""
OPEN_CHUNKS = 4
"""Open chunks at the most loops that it has room for besides (`chunk` mode)."""
CHAT_TOKENS = 256
"""Room for a chat template and a question."""
MOST_ANSWER_TOKENS = 8192
"""With more, the crowd of `contract.py` would not fill the cache."""


@dataclass(frozen=True)
class Target:
    """What is served and checked.

    Attributes:
        folder: the checkpoint.
        config: what it states.
        mode: the decode mode to serve it in; None for a LoopLM.
        tokenizer: its own.
        questions: what a chat model is asked.
        stream: token ids that prompts are cut out of.
        prompts: how many the reference answers, too, at the default depth.
        answer_tokens: the most of an answer to a question.
        quick: fewer and shorter requests.
        cuda: whether PyTorch finds a GPU here.
        words: flags for the server.
    """

    folder: Path
    config: LoopLMConfig
    mode: DecodeMode | None
    tokenizer: Any
    questions: Sequence[str]
    stream: Sequence[int]
    prompts: int
    answer_tokens: int
    quick: bool
    cuda: bool
    words: Sequence[str] = ()

    @property
    def part(self) -> str:
        """Its name in tables."""
        return f"MELT, {self.mode}" if self.mode else "LoopLM"

    @property
    def unit(self) -> int:
        """Tokens that prompts are measured in: C, or a KV block."""
        return self.config.chunk_size if isinstance(self.config, MeltConfig) else CPU_BLOCKS[0]

    @property
    def most_loops(self) -> int:
        """The most loops that a request may ask for."""
        return self.config.most_loops

    @property
    def generated(self) -> int:
        """Tokens of an answer that is held against the reference."""
        return 8 if self.quick else 16

    @property
    def lengths(self) -> list[int]:
        """Lengths of prompts: inside a chunk, on its end and behind it, and of several chunks."""
        unit = self.unit
        wanted = {unit - 1, unit + 1, 2 * unit + 3} if self.quick else {1, unit - 1, unit, unit + 1, 2 * unit + 3}
        most = self.config.max_position_embeddings - self.generated
        return sorted(length for length in wanted if 1 <= length <= most)

    @property
    def context(self) -> int:
        """The most tokens of a request."""
        longest = max(2 * self.unit + 3 + self.generated, 4 * self.block, CHAT_TOKENS + self.answer_tokens)
        return min(on_grid(longest, self.block), self.config.max_position_embeddings)

    @property
    def longest_answer(self) -> int:
        """The most tokens of an answer to a question, where a prompt and it fit."""
        return min(self.answer_tokens, self.context // 2)

    @property
    def block(self) -> int:
        """The largest KV block that the server may choose, in tokens."""
        finest, default = CPU_BLOCKS
        return min(max(self.unit, finest), default) if self.mode else default

    @property
    def kv_cache_bytes(self) -> int:
        """The cache that the server gets."""
        tokens = max(self.context, ROOM * self.block) + self.block  # vLLM never uses the first block
        if self.mode == "chunk":
            tokens += OPEN_CHUNKS * (self.most_loops - 1) * on_grid(self.unit, self.block)
        wide = any("float32" in word for word in self.words)  # else vLLM serves in 16 bits
        return tokens * kv_bytes_per_token(self.config, 4 if wide else 2)

    def command(self, port: int) -> list[str]:
        """Return the server's command line: `melt-serve serve`, with what makes its checks possible."""
        own = [] if self.folder == MELT else [str(self.folder)]  # without a path, with the bundled one's own flags
        flags = {"--port": port, "--max-model-len": self.context, "--kv-cache-memory-bytes": self.kv_cache_bytes}
        words = [f"{flag}={value}" for flag, value in flags.items()]
        if self.mode:
            words.append(f"--hf-overrides.decode_mode={self.mode}")
        if self.cuda:
            words.append("--no-enforce-eager")  # with graphs and compilation, as long as nothing else is said
        elif self.quick:
            words.append("--enforce-eager")  # compiling takes a minute there
        return [sys.executable, "-m", "melt_serve.cli", "serve", *own, *words, *self.words]

    def window(self, number: int, length: int) -> list[int]:
        """Cut a prompt out of the text, another one for each number; the text is repeated if it is short."""
        first = 7 + 61 * number
        return [self.stream[at % len(self.stream)] for at in range(first, first + length)]


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Attributes:
        target: what it serves.
        client: who asks it.
        log: the file with its output.
        seconds: from its start until it was ready.
    """

    target: Target
    client: Client
    log: Path
    seconds: float

    @cached_property
    def info(self) -> dict[str, Any]:
        """What `/melt/info` says that does not change."""
        return self.client.info()

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return self.info["kv_block_size"]

    @property
    def depths(self) -> dict[str, Depth]:
        """Depths to ask for, by name, the default first."""
        default, most = self.target.config.total_ut_steps, self.target.most_loops
        depths: dict[str, Depth] = {f"{default} loops, the default": {}}
        wanted = {1, most} if self.target.quick else {1, 2, default - 1, default + 1, most}
        others = sorted(loops for loops in wanted - {default} if 1 <= loops <= most)
        return depths | {f"{loops} loop{'s' if loops > 1 else ''}": {"loops": loops} for loops in others}


@contextmanager
def served(target: Target, progress: Callable[[float], None]) -> Iterator[Served]:
    """Start the server, yield it once it is ready, and stop it.

    Raises:
        ServerError: it did not start.
    """
    port, started = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="melt-verify-") as folder:
        log = Path(folder) / "log"
        environment = {"VLLM_GPU_SYNC_CHECK": "warn"} if target.cuda else {}
        with running(
            target.command(port), port, log, environment=environment, start_new_session=True, progress=progress
        ) as server:
            yield Served(target, Client(server.url), log, time.monotonic() - started)
