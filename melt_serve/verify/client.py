"""The server under test, as its clients see it: answers with log-probabilities, facts and metrics."""

import json
import os
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

TOP = 20
"""Log-probabilities asked for each token: vLLM's default limit."""
SECONDS = 600
"""How long an answer may take."""

Row = Mapping[int, float]
"""Log-probabilities of the likeliest tokens at one place, by token id."""
Depth = Mapping[str, float]
"""A request's `vllm_xargs`: `loops` or `exit_threshold`, or neither."""


@dataclass(frozen=True)
class Asked:
    """A request: greedy, of exactly `tokens` tokens.

    Attributes:
        prompt: token ids.
        tokens: how many to generate.
        depth: how deep.
    """

    prompt: Sequence[int]
    tokens: int
    depth: Depth


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        prompt: token ids.
        tokens: generated ones.
        rows: what the server said before each of them.
        loops: `usage.loops`; None if it was not told.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    rows: Sequence[Row]
    loops: Mapping[str, float] | None


@dataclass(frozen=True)
class ChatAnswer(Answer):
    """What came back from a chat; its prompt is as the template made it.

    Attributes:
        ended: OpenAI's `finish_reason`.
        reasoning, content: as the server split them.
    """

    ended: str
    reasoning: str | None
    content: str | None


class Client:
    """Talks to one server."""

    def __init__(self, url: str):
        self.url = url
        self.key = os.environ.get("VLLM_API_KEY", "none")
        self.openai = OpenAI(base_url=f"{url}/v1", api_key=self.key, max_retries=0, timeout=SECONDS)
        self.model = self.openai.models.list().data[0].id

    def complete(self, asked: Asked, salt: str, logprobs: int | None = TOP) -> Answer:
        """Send one request; those with different salts share no rows. Without `logprobs` the answer has no rows."""
        completion = self.openai.completions.create(
            model=self.model,
            prompt=list(asked.prompt),
            max_tokens=asked.tokens,
            temperature=0,
            logprobs=logprobs,
            extra_body={**TOKEN_IDS, "ignore_eos": True, "cache_salt": salt, "vllm_xargs": dict(asked.depth)},
        )
        (choice,) = completion.choices
        places = (choice.logprobs and choice.logprobs.top_logprobs) or ()
        rows = [{token_id(word): value for word, value in row.items()} for row in places]
        return Answer(asked.prompt, choice.token_ids, rows, loops_of(completion))  # type: ignore[attr-defined]

    def complete_at_once(self, requests: Sequence[Asked], salt: str, logprobs: int | None = TOP) -> list[Answer]:
        """Send all requests together."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda asked: self.complete(asked, salt, logprobs), requests))

    def chat(
        self,
        text: str,
        tokens: int,
        effort: str | None = None,
        bias: Mapping[int, int] | None = None,
        logprobs: bool = False,
    ) -> ChatAnswer:
        """Ask a chat model greedily, for at most `tokens` tokens; `bias` is added to logits, by token id."""
        completion: Any = self.openai.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=tokens,
            temperature=0,
            logprobs=logprobs,
            top_logprobs=TOP if logprobs else None,
            logit_bias={str(token): value for token, value in (bias or {}).items()},
            extra_body={**TOKEN_IDS, **({"reasoning_effort": effort} if effort else {})},
        )
        (choice,) = completion.choices
        rows = [
            {token_id(each.token): each.logprob for each in [place, *place.top_logprobs]}
            for place in (choice.logprobs.content if logprobs else ())
        ]
        return ChatAnswer(
            completion.prompt_token_ids,
            choice.token_ids,
            rows,
            loops_of(completion),
            choice.finish_reason,
            getattr(choice.message, "reasoning", None),
            choice.message.content,
        )

    def chat_at_once(self, texts: Sequence[str], tokens: int) -> list[ChatAnswer]:
        """Ask several together, each for at most `tokens` tokens."""
        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(lambda text: self.chat(text, tokens), texts))

    def info(self) -> dict[str, Any]:
        """Read `/melt/info`."""
        return json.loads(self.get("/melt/info"))

    def metrics(self) -> dict[str, float]:
        """Read `/metrics`: each metric's sum over its labels."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    def get(self, path: str) -> str:
        """Return the body of a GET."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.read().decode()


TOKEN_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}
"""Fields of vLLM's: ids, because two tokens may be the same text."""


def token_id(word: str) -> int:
    """Return the id in a token that vLLM writes as `token_id:17`."""
    return int(word.removeprefix("token_id:"))


def loops_of(completion: Any) -> Mapping[str, float] | None:
    """Return `usage.loops`, a field of ours."""
    return getattr(completion.usage, "loops", None)
