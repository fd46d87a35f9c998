"""`melt-serve chat`: what is typed goes to an OpenAI-compatible server, and its answer is shown as it comes."""

import json
import math
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openai import APIConnectionError, APIStatusError, AuthenticationError, NotFoundError, OpenAI, OpenAIError
from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.formatted_text import FormattedText

from melt_serve.server_process import ServerError, own_server
from melt_serve.terminal import CONTROLS, fail

HELP = """\
/loops N        each token runs N loops: the deeper, the slower
/effort WORD    the same in OpenAI's words, from none and minimal to high and max
/threshold Q    a token leaves its loops early, once the exit gate is Q sure; at 1 never
/system TEXT    what the model is told before the conversation
/new            begin a new conversation; what is set stays set
/help           this list
/quit           end the chat; so do Ctrl-C and Ctrl-D at the prompt
The first four without a word after them take back what was set. A question that begins with / needs a blank first."""

INFO_SECONDS = 5


class ChatError(RuntimeError):
    """What keeps a question, a command or a chat from its answer; the message says what to do."""


@dataclass
class Answer:
    """What has come of an answer so far.

    Attributes:
        finish_reason: OpenAI's; None while it goes on, or where it was cut off.
        usage: OpenAI's, with vLLM's and our own fields; None where the server has not told it.
        seconds: since the question was sent.
    """

    content: str = ""
    finish_reason: str | None = None
    usage: Any = None
    seconds: float = 0.0


class Chat:
    """A conversation with a server, and the depth that its questions are asked at.

    Args:
        client: the server's.
        model: by its name there.
        info: the server's `/melt/info`; None where it has none.
        temperature: of sampling; None for the model's own.
    """

    def __init__(self, client: OpenAI, model: str, info: dict[str, Any] | None, temperature: float | None):
        self.client = client
        self.model = model
        self.info = info
        self.temperature = temperature
        self.turns: list[Any] = []
        self.system: str | None = None
        self.effort: str | None = None
        self.depth: dict[str, float] = {}

    def ask(self, question: str, show: Callable[[str, bool], None]) -> Answer:
        """Ask, and return the answer. What was said of it stays in the conversation, also if it is interrupted.

        Args:
            show: gets each piece as it comes, and whether it is reasoning.

        Raises:
            ChatError: the server refuses the question or does not answer to the end.
        """
        asked: Any = {"role": "user", "content": question}
        told: list[Any] = [] if self.system is None else [{"role": "system", "content": self.system}]
        body: dict[str, object] = {} if self.temperature is None else {"temperature": self.temperature}
        if self.effort:
            body["reasoning_effort"] = self.effort
        if self.depth:
            body["vllm_xargs"] = self.depth
        answer, started = Answer(), time.monotonic()
        try:
            with self.client.chat.completions.create(
                model=self.model,
                messages=[*told, *self.turns, asked],
                stream=True,
                stream_options={"include_usage": True},
                extra_body=body,
            ) as stream:
                for chunk in stream:
                    answer.usage = chunk.usage or answer.usage
                    for choice in chunk.choices or ():
                        delta: Any = choice.delta
                        answer.finish_reason = choice.finish_reason or answer.finish_reason
                        reasoning = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)
                        if reasoning:
                            show(reasoning, True)
                        if delta.content:
                            begun = answer.content.strip("\n")  # many models begin with blank lines
                            answer.content += delta.content
                            show(delta.content if begun else delta.content.lstrip("\n"), False)
        except (OpenAIError, ValueError, AttributeError, TypeError) as error:  # what came is no JSON, or not OpenAI's
            raise ChatError(reason(error)) from None
        finally:
            answer.seconds = time.monotonic() - started
            if answer.content:
                self.turns += [asked, {"role": "assistant", "content": answer.content}]
        return answer

    def obey(self, line: str) -> str:
        """Do what a line that begins with / says; return what to tell about it.

        Raises:
            ChatError: there is no such command, or it is not for this value.
        """
        command, _, value = line.partition(" ")
        value = value.strip()
        match command:
            case "/loops":
                return self.set_loops(value)
            case "/effort":
                return self.set_effort(value)
            case "/threshold":
                return self.set_threshold(value)
            case "/system":
                self.system = value or None
                return "the model is told this first" if value else "the model is told nothing first"
        if value:
            raise ChatError(f"{command} takes no more words; /help lists the commands")
        match command:
            case "/new":
                self.turns.clear()
                return "a new conversation"
            case "/help":
                return HELP
        raise ChatError(
            f"{command} is no command; /help lists them, and a question that begins with / needs a blank first"
        )

    def set_loops(self, value: str) -> str:
        """Ask for so many loops from now on; without a value for the server's default."""
        most = self.info["max_loops"] if self.info else math.inf
        loops = int(value) if re.fullmatch(r"\d{1,9}", value) else 0
        if value and not 1 <= loops <= most:
            here = f"from 1 to {most}" if self.info else "of at least 1"
            raise ChatError(f"/loops takes a whole number {here}, not {value!r}; alone, it goes back to the default")
        self.depth.pop("loops", None)
        self.effort = None
        if value:
            self.depth["loops"] = loops
        return f"loops: {self.loops or 'as the server likes'}"

    def set_effort(self, value: str) -> str:
        """Ask with OpenAI's `reasoning_effort` from now on; without a value with none."""
        efforts = self.info["effort_loops"] if self.info else {}
        if value and efforts and value not in efforts:
            raise ChatError(f"/effort takes {', '.join(efforts)}, not {value!r}; alone, it goes back to the default")
        self.depth.pop("loops", None)
        self.effort = value or None
        return f"effort: {value or 'none asked for'}, loops: {self.loops or 'as the server likes'}"

    def set_threshold(self, value: str) -> str:
        """Let tokens leave their loops early from now on; without a value as the server does by default."""
        try:
            threshold = float(value or 1)
        except ValueError:
            threshold = 0.0
        if not 0 < threshold <= 1:
            raise ChatError(f"/threshold takes a number above 0 and at most 1, which is never, not {value!r}")
        self.depth.pop("exit_threshold", None)
        if value:
            self.depth["exit_threshold"] = threshold
        return f"threshold: {value or (self.info or {}).get('exit_threshold', 'as the server likes')}"

    @property
    def loops(self) -> int | None:
        """The most loops that the next question's tokens run; None if only the server knows."""
        if "loops" in self.depth:
            return int(self.depth["loops"])
        if self.info is None:
            return None
        return self.info["effort_loops"][self.effort] if self.effort else self.info["default_loops"]

    def numbers(self, answer: Answer) -> str:
        """Return in a line what an answer took, as far as the server tells it."""
        if answer.usage is None:
            return f"{answer.seconds:.1f} s"
        tokens = answer.usage.completion_tokens
        parts = [f"{tokens} token{'s' * (tokens != 1)}", f"{tokens / answer.seconds:.1f} tokens/s"]
        if ran := getattr(answer.usage, "loops", None):
            parts.append(f"loops {ran['mean']:.3g} on average, {ran['max']} at most")
        if self.info:
            capacity = self.info["kv_capacity_tokens"] * self.info["kv_bytes_per_token"]
            parts.append(f"KV {in_bytes(self.row_bytes(answer.usage.total_tokens))} of {in_bytes(capacity)}")
        return ", ".join(parts)

    def row_bytes(self, tokens: int) -> float:
        """Return the bytes of the KV blocks that hold the final rows of a conversation of so many tokens."""
        assert self.info is not None
        block = self.info["kv_block_size"]
        nbytes = -(-tokens // block) * block * self.info["kv_bytes_per_token"]
        if self.info.get("decode_mode") is None:  # a LoopLM's, which has rows of each loop, are told at its default
            nbytes *= (self.loops or 1) / self.info["default_loops"]
        return nbytes


def chat_alone(checkpoint: str | None, temperature: float | None) -> int:
    """Chat with a server that is started for it; return the exit code."""
    from melt_serve.checkpoint_config import located_looped  # slow to import, and --server does without
    from melt_serve.checkpoint_path import CheckpointError

    try:
        path = [] if checkpoint is None else [str(located_looped(checkpoint))]  # fetches, where it can be seen
    except CheckpointError as error:
        return fail(error, code=2)

    def words(port: int) -> list[str]:
        return [sys.executable, "-m", "melt_serve.cli", "serve", *path, "--host", "127.0.0.1", "--port", str(port)]

    try:
        with own_server(words, checkpoint or "the bundled checkpoint", sys.stderr) as server:
            code = chat_with(f"{server.url}/v1", os.environ.get("VLLM_API_KEY"), None, temperature)
            if sys.stdin.isatty():
                print("Stopping the server ...", file=sys.stderr)
        return code
    except ServerError as error:
        said = [line for line in str(error).splitlines() if line.startswith("melt-serve: error: ")]
        return fail(said[-1].removeprefix("melt-serve: error: ") if said else error, code=2)


def chat_with(url: str, key: str | None, model: str | None, temperature: float | None) -> int:
    """Chat with the server at a URL, which ends in /v1; return the exit code."""
    key = key or os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or "none"
    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    try:
        chat = Chat(client, model or first_model(client), info_of(url, key), temperature)
    except ChatError as error:
        return fail(error)
    return talk(chat) if sys.stdin.isatty() and sys.stdout.isatty() else answer_lines(chat)


def first_model(client: OpenAI) -> str:
    """Return the first model that a server lists.

    Raises:
        ChatError: it lists none, or cannot be asked.
    """
    try:
        models = client.models.list().data
    except NotFoundError:
        raise ChatError(f"{client.base_url} has no models; an OpenAI-compatible server's URL ends in /v1") from None
    except (OpenAIError, ValueError) as error:
        raise ChatError(reason(error)) from None
    if not models:
        raise ChatError(f"{client.base_url} lists no models: name one with --model")
    return models[0].id


def info_of(url: str, key: str) -> dict[str, Any] | None:
    """Return what the server tells at `/melt/info`; None if it has no such route, as under plain vLLM."""
    place = f"{url.rstrip('/').removesuffix('/v1')}/melt/info"
    try:
        request = urllib.request.Request(place, headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=INFO_SECONDS) as response:
            info = json.load(response)
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and "max_loops" in info else None


def reason(error: Exception) -> str:
    """Return in a sentence why a server did not answer, with the remedy where it is ours to know."""
    if isinstance(error, APIConnectionError):
        return f"no answer from {error.request.url}: {error.__cause__ or error}; does the server still run?"
    body = error.body if isinstance(error, APIStatusError) else None
    said = str(body["message"] if isinstance(body, dict) and body.get("message") else error)
    if isinstance(error, AuthenticationError):
        return f"{said.rstrip('.')}; give the server's key: --api-key, or else OPENAI_API_KEY, or else VLLM_API_KEY"
    return f"{said.rstrip('.')}; /new begins a new conversation" if "context length" in said else said


def answer_lines(chat: Chat) -> int:
    """Answer each line of standard input, and return the exit code: 1 after the first error, which ends it."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for line in sys.stdin:
        said = len(chat.turns)
        question = line.rstrip()
        try:
            if question == "/quit":
                break
            if question.startswith("/"):
                chat.obey(question)
            elif question:
                try:
                    answer = chat.ask(question, show_plainly)
                finally:
                    if len(chat.turns) > said:  # also part of an answer ends its line
                        print(flush=True)
                if why := cut(answer):
                    raise ChatError(why)
        except ChatError as error:
            return fail(error)
    return 0


def show_plainly(text: str, is_reasoning: bool) -> None:
    """Print a piece of an answer, but no reasoning."""
    if not is_reasoning:
        print(CONTROLS.sub("", text), end="", flush=True)


def talk(chat: Chat) -> int:
    """Talk with whoever sits at the terminal, until they end it; return the exit code."""
    loops = f", {chat.loops} loops of at most {chat.info['max_loops']}" if chat.info else ""
    dimmed(f"{chat.model}{loops}. /help lists commands; Ctrl-C stops an answer; Ctrl-D ends the chat.\n")
    for line in typed():
        try:
            if line == "/quit":
                break
            if line.startswith("/"):
                dimmed(chat.obey(line) + "\n")
            elif line:
                answer_in_terminal(chat, line)
        except KeyboardInterrupt:
            dimmed("\nstopped\n")
        except ChatError as error:
            shown("ansired", f"{CONTROLS.sub('', str(error))}\n")
    return 0


def typed() -> Iterator[str]:
    """Yield the lines that are typed, until Ctrl-D or Ctrl-C."""
    session: PromptSession[str] = PromptSession()
    while True:
        try:
            line = session.prompt([("bold", "> ")])
        except (EOFError, KeyboardInterrupt):
            return
        yield line.encode(errors="replace").decode().rstrip()  # bytes that are no UTF-8 arrive as lone surrogates


def answer_in_terminal(chat: Chat, question: str) -> None:
    """Show reasoning, answer and numbers.

    Raises:
        ChatError: as `Chat.ask`.
    """
    style = ""

    def show(text: str, is_reasoning: bool) -> None:
        nonlocal style
        if style == "dim" and not is_reasoning:
            shown("", "\n")
        style = "dim" if is_reasoning else "answer"
        shown("dim" if is_reasoning else "", CONTROLS.sub("", text))

    try:
        answer = chat.ask(question, show)
    except ChatError:
        shown("", "\n" * bool(style))
        raise
    shown("", "\n")
    if why := cut(answer):
        shown("ansired", f"{why}\n")
    dimmed(f"{chat.numbers(answer)}\n")


def cut(answer: Answer) -> str | None:
    """Return why an answer is not whole; None if it is."""
    if answer.finish_reason == "length":
        return "cut: there is no room for more tokens; /new begins a new conversation"
    if answer.finish_reason is None:
        return "cut: the connection ended before the answer"
    return None if answer.finish_reason in ("stop", "tool_calls") else f"cut: {answer.finish_reason}"


def dimmed(text: str) -> None:
    """Print a line beside the conversation."""
    shown("dim", f"{text}\n" if text else "")


def shown(style: str, text: str) -> None:
    """Print text in one of prompt_toolkit's styles, at once."""
    print_formatted_text(FormattedText([(style, text)]), end="")


def in_bytes(count: float) -> str:
    """Write bytes with a unit, such as `1.5 MiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {units[power]}"
