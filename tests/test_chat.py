"""`melt-serve chat` as its user sees it: in a real terminal, and between pipes."""

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
import urllib.request
from contextlib import suppress

import psutil
import pytest

from melt_serve import chat as chatting
from melt_serve import cli
from melt_serve.server_process import free_port
from tests.signals import hear_ctrl_c, still_running

ALOUD = (
    "Find everybody. Ann is in Rome. Bob is with Ann. Eve is in Oslo. Kim is with Bob. Leo is with Kim. Where is Kim?"
)
CTRL_C, CTRL_D = "\x03", "\x04"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
NUMBERS = r"\d+ tokens?, [\d.]+ tokens/s, loops ([\d.]+) on average, (\d) at most, KV ([\d.]+) KiB of [\d.]+ MiB\n"
PROMPT = r"\n>"
PATIENCE = 300  # of which a server of its own may take most to start, on a machine that does other things


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "melt_serve.cli", "chat", *words]


def take_terminal() -> None:
    """Run in a child before it starts: its terminal's Ctrl-C becomes a signal to it."""
    hear_ctrl_c()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The command in a terminal of its own: 200 columns wide, and Ctrl-C in it is a signal, as everywhere."""

    def __init__(self, *words: str, **environment: str):
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (50, 200))
        self.process = subprocess.Popen(
            command(*words),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **environment, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.raw = ""

    def type(self, text: str) -> None:
        for start in range(0, len(text), 256):  # what is echoed is read in between, or both sides would wait
            os.write(self.ours, text[start : start + 256].encode())
            self.read(0)

    def read(self, patience: float) -> None:
        """Take what is on its way to the screen."""
        if select.select([self.ours], [], [], patience)[0]:
            with suppress(OSError):  # it has ended
                self.raw += os.read(self.ours, 1 << 16).decode(errors="replace")

    def see(self, pattern: str) -> re.Match[str]:
        """Wait until the screen has this, and forget all that is before its end."""
        deadline, ended = time.monotonic() + PATIENCE, False
        while not (found := re.search(pattern, ESCAPES.sub("", self.raw))):
            assert not ended and time.monotonic() < deadline, f"no {pattern!r} in {ESCAPES.sub('', self.raw)!r}"
            ended = self.process.poll() is not None
            self.read(1)
        self.raw = ESCAPES.sub("", self.raw)[found.end() :]
        return found

    def ask(self, question: str) -> tuple[float, int, float]:
        """Ask, wait for the whole answer, and return its loops, mean and most, and its KiB of rows."""
        self.type(f"{question}\r")
        mean, most, kib = self.see(NUMBERS + PROMPT).groups()
        return float(mean), int(most), float(kib)

    def ends(self) -> int:
        while self.process.poll() is None:
            self.read(1)
        return self.process.returncode


@pytest.fixture
def terminal():
    """Opens terminals, and leaves none behind."""
    opened = []

    def open_one(*words: str, **environment: str) -> Terminal:
        opened.append(Terminal(*words, **environment))
        return opened[-1]

    yield open_one
    for each in opened:
        if each.process.poll() is None:
            each.process.terminate()
            each.ends()
        os.close(each.ours)


@pytest.fixture
def talking(terminal, server):
    """A terminal in which a chat with the session's server has begun."""
    chat = terminal("--server", f"{server}/v1", "--temperature", "0")
    chat.see(r"melt-demo, 4 loops of at most 8\. /help lists commands[^\n]*\n" + PROMPT)
    return chat


def piped(text: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(command(*words), input=text, capture_output=True, text=True, env=environment)


def running(server: str) -> int:
    with urllib.request.urlopen(f"{server}/melt/info") as response:
        return json.load(response)["now"]["running"]


def ended_by_length(server: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics") as response:
        metrics = response.read().decode()
    found = re.search(r'^vllm:request_success_total\{.*finished_reason="length".*\} (\S+)$', metrics, re.MULTILINE)
    return float(found[1])


def test_reasoning_is_dimmed_and_the_answer_is_not(talking):
    talking.type(f"{ALOUD}\r")
    deadline = time.monotonic() + PATIENCE
    while "tokens/s" not in talking.raw and time.monotonic() < deadline:
        talking.read(1)
    dimmed = "".join(re.findall(r"\x1b\[0;2m(.*?)\x1b\[0m", talking.raw, re.DOTALL))
    assert re.match(r"Follow Kim Bob Ann Rome\d+ tokens", dimmed)
    assert talking.see(r"Follow Kim Bob Ann Rome\nIn Rome\.\n" + NUMBERS)


def test_the_dials_turn_the_loops_of_the_answers_that_follow(talking):
    assert talking.ask(ALOUD)[:2] == (4, 4)
    for words, says, loops in (
        ("/loops 2", "loops: 2", (2, 2)),
        ("/effort high", "effort: high, loops: 6", (6, 6)),
        ("/loops", "loops: 4", (4, 4)),
    ):
        talking.type(f"{words}\r")
        talking.see(says)
        assert talking.ask(ALOUD)[:2] == loops
    talking.type("/threshold 0.5\r")
    talking.see("threshold: 0.5")
    mean, most, _ = talking.ask(ALOUD)
    assert 1 <= mean < 4 and most <= 4


def test_what_was_said_is_sent_again_until_a_new_conversation_begins(talking):
    first, second = talking.ask(ALOUD)[2], talking.ask(ALOUD)[2]
    assert second > first
    talking.type("/system Be brief.\r")
    talking.see("the model is told this first")
    third = talking.ask(ALOUD)[2]
    talking.type("/new\r")
    talking.see("a new conversation")
    with_system = talking.ask(ALOUD)[2]
    assert third > second and first <= with_system < second
    talking.type(f"{'Ann is in Rome. ' * 200}\r")
    talking.see(r"maximum context length is 768 tokens[^\n]*; /new begins a new conversation\n")
    assert talking.ask(ALOUD)[2] > with_system  # what was refused is not part of it, and what was before is


def test_ctrl_c_stops_an_answer_and_not_the_chat(talking, server):
    talking.type("/loops 1\r")  # after one loop the bundled checkpoint repeats a name to the end of the context
    talking.see("loops: 1")
    before = ended_by_length(server)
    talking.type(f"{ALOUD}\r")
    talking.see(r"Where is Kim\?\s*\n[^\n]*(Kim|Ann|Bob|Follow)")
    talking.type(CTRL_C)
    talking.see("\nstopped\n" + PROMPT)
    deadline = time.monotonic() + PATIENCE
    while running(server):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ended_by_length(server) == before
    talking.type("/loops 4\r")
    talking.see("loops: 4")
    talking.ask(ALOUD)
    talking.type(CTRL_C)
    assert talking.ends() == 0


@pytest.mark.parametrize("words", ["/quit\r", CTRL_D])
def test_a_wrong_command_is_a_line_that_says_what_is_right(talking, words):
    for wrong, says in (
        ("/loops 9", r"a whole number from 1 to 8, not '9'"),
        ("/loops deep", r"a whole number from 1 to 8, not 'deep'"),
        ("/effort huge", r"/effort takes none, minimal, low, medium, high, xhigh, max, not 'huge'"),
        ("/threshold 2", r"above 0 and at most 1, which is never, not '2'"),
        ("/threshold nan", r"above 0 and at most 1, which is never, not 'nan'"),
        ("/new now", r"/new takes no more words"),
        ("/etc/hosts", r"/etc/hosts is no command; /help lists them"),
    ):
        talking.type(f"{wrong}\r")
        talking.see(f"{says}[^\n]*\n")
    talking.type("/help\r")
    talking.see(r"/threshold Q +a token leaves[^>]*" + PROMPT)
    talking.type(words)
    assert talking.ends() == 0


def test_lines_from_a_pipe_are_answered_in_turn(server):
    done = piped(f"/loops 4\n{ALOUD}\n\n/new\n{ALOUD}", "--server", f"{server}/v1", "--temperature", "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "In Rome.\nIn Rome.\n", "")


def test_what_a_script_cannot_have_is_a_line_and_an_exit_code(server):
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    for text, url, code, says in (
        (f"/loops 1\n{ALOUD}\n", f"{server}/v1", 1, "cut: there is no room for more tokens"),
        (f"/loops 9\n{ALOUD}\n", f"{server}/v1", 1, "from 1 to 8, not '9'"),
        (ALOUD, nobody, 1, f"no answer from {nobody}/models: "),
        (ALOUD, server, 1, "an OpenAI-compatible server's URL ends in /v1"),
    ):
        done = piped(text, "--server", url, "--temperature", "0")
        assert done.returncode == code and done.stderr.count("\n") == 1 and says in done.stderr, done


def test_what_would_steer_the_terminal_is_not_printed(capsys):
    chatting.show_plainly("In\x1b[2J\x9b2J Rome.\a\n\tYes.", False)
    assert capsys.readouterr().out == "In[2J2J Rome.\n\tYes."


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--server http://127.0.0.1:1/v1 ./melt", "leave one out"),
        ("--model melt-demo", "go with --server"),
        ("--temperature nan", "is not a number of at least 0"),
        ("--temperature warm", "invalid temperature value"),
    ],
)
def test_words_that_do_not_fit_are_refused(capsys, words, says):
    try:
        code = cli.main(["chat", *words.split()])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and says in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_served_is_one_line(tmp_path):
    done = piped(ALOUD, str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stdout == ""
    assert "nowhere" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_chat_with_a_server_of_its_own_outlives_it_and_leaves_nothing_running(terminal):
    chat = terminal("--temperature", "0", VLLM_API_KEY="secret")
    url = chat.see(r"Ready at (http://127\.0\.0\.1:\d+) after \d+ s\.\n")[1]
    chat.see(r"melt-demo, 4 loops of at most 8[^\n]*\n" + PROMPT)
    refused = piped(ALOUD, "--server", f"{url}/v1", OPENAI_API_KEY="", VLLM_API_KEY="")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "give the server's key: --api-key, or else OPENAI_API_KEY" in refused.stderr
    assert chat.ask(ALOUD)[:2] == (4, 4)
    started = psutil.Process(chat.process.pid).children(recursive=True)
    assert len(started) >= 3  # the supervisor, the API server and the engine
    for each in started:
        each.kill()
    chat.type(f"{ALOUD}\r")
    chat.see(r"no answer from http://127[^\n]*; does the server still run\?" + PROMPT)
    chat.type(CTRL_D)
    assert chat.ends() == 0 and not still_running(started)
