"""A user: asks the bundled task's held-out questions through the official client, streamed, and judges the answers."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import openai
from locust import User, constant

from loadtests.scenarios import Step
from loadtests.seen import Asked
from melt_serve.task.who_is_where import Question, questions

LONG_STORIES = 12
"""Stories of a long prompt; each is about 130 tokens."""
MOST_TOKENS = 200
"""Tokens of an answer, at most: one that has too few loops goes on without end."""


class Asker:
    """What all users of a run share: the server, the step they are in, and what they saw.

    Attributes:
        begun: when the run began.
        asked: requests that were answered; each goes to the list that was here when it began.
        open: requests that were not answered yet.
    """

    def __init__(self, url: str, model: str, key: str, fixed_loops: int | None):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        self.model = model
        self.fixed_loops = fixed_loops
        self.begun = time.monotonic()
        self.step: Step | None = None
        self.asked: list[Asked] = []
        self.open = 0
        self.questions: Iterator[Question] = questions("heldout", "load")
        self.turn = itertools.count()
        self.lock = threading.Lock()

    def ask(self, fire: Callable[..., None]) -> None:
        """Make one request and tell locust of it through `fire`, the environment's request event."""
        step, seen = self.step, self.asked
        if step is None:  # the run is over
            time.sleep(0.1)
            return
        with self.lock:
            turn = next(self.turn)
            question = next(self.questions)
            while step.tokens and question.kind != "silent":  # answers of one length
                question = next(self.questions)
            prompt = question.prompt
            if step.long:
                prompt = " ".join([*(next(self.questions).prompt for _ in range(LONG_STORIES - 1)), prompt])
        loops = self.fixed_loops or step.loops[turn % len(step.loops)]
        self.open += 1
        try:
            asked = self.request(question, prompt, loops, step)
        finally:
            self.open -= 1
        seen.append(asked)
        failure = RuntimeError(asked.error) if asked.error else None
        for name, seconds in (
            ("first token", asked.first),
            ("a token", asked.seconds_per_token),
            ("all", asked.seconds),
        ):
            fire(
                request_type=name,
                name=f"loops={loops}",
                response_time=1000 * seconds,
                response_length=asked.tokens,
                exception=failure if name == "all" else None,
            )

    def request(self, question: Question, prompt: str, loops: int, step: Step) -> Asked:
        """Send the request, read the streamed answer, and take the times."""
        extra: dict[str, object] = {} if self.fixed_loops else {"vllm_xargs": {"loops": loops}}
        if step.tokens:
            extra["ignore_eos"] = True
        start, first, tokens, text = time.monotonic(), 0.0, 0, ""
        error = None
        try:
            for piece in self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=step.tokens or MOST_TOKENS,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            ):
                if piece.usage:
                    tokens = piece.usage.completion_tokens
                if piece.choices:
                    first = first or time.monotonic() - start
                    text += piece.choices[0].delta.content or ""
        except openai.OpenAIError as problem:
            error = f"{type(problem).__name__}: {problem}"
        if not tokens and not error:
            error = "the stream ended without its usage"
        answer = text.strip()
        # Where the end is ignored, something follows it.
        right = answer.startswith(question.answer) if step.tokens else question.check(answer)
        return Asked(start - self.begun, loops, first, time.monotonic() - start, tokens, right, error)


class MeltUser(User):
    """A locust user that asks again as soon as it was answered."""

    wait_time = constant(0)
    abstract = True
    asker: Asker

    def ask(self) -> None:
        """Ask once; this is locust's task."""
        self.asker.ask(self.environment.events.request.fire)

    tasks = [ask]  # noqa: RUF012
