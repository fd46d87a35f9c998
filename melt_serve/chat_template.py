"""A chat template is a program that comes with a checkpoint: it is tried within limits of time and memory."""

import os
import resource
import signal
from pathlib import Path

from jinja2.exceptions import TemplateSyntaxError

from melt_serve.checkpoint_config import read_json

SECONDS = 2
EXTRA_BYTES = 512 << 20
"""Memory that a template may take beside what the process has."""
MOST_CHARACTERS = 1 << 20
CHAT = [{"role": "user", "content": "Hello"}]
TOO_LARGE, BROKEN = 3, 4
"""Exit codes of the process that tries it."""


class TemplateError(ValueError):
    """A chat template cannot be used; the message names its file, and the remedy."""


def template_of(folder: Path, instead: Path | None = None) -> tuple[Path, str] | None:
    """Return the chat template of a checkpoint, or the one used instead, with its file; None where there is no file."""
    path = instead or folder / "chat_template.jinja"
    if os.path.isfile(path):  # no error for a name that is too long, as a template's text is
        return path, path.read_text(encoding="utf-8", errors="replace")
    if instead is not None:
        return None
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return (path, template) if isinstance(template, str) else None


def try_template(path: Path, template: str) -> None:
    """Render a chat of one word, in a process that ends when it takes too long or too much.

    A template may refuse such a chat; that is no fault.

    Raises:
        TemplateError: it takes too long, too much memory, writes too much, or is no template.
    """
    child = os.fork()
    if child == 0:
        code = 0  # if it could not be tried
        try:
            limit_this_process()
            code = rendered(template)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    remedy = f"correct the chat template in {path}, or name another with --chat-template"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise TemplateError(f"a chat of one word takes the chat template more than {SECONDS} s; {remedy}")
    if code == TOO_LARGE:
        raise TemplateError(
            f"the chat template makes more than {MOST_CHARACTERS:,} characters of a chat of one word, or takes more "
            f"than {EXTRA_BYTES >> 20} MiB for it; {remedy}"
        )
    if code == BROKEN:
        raise TemplateError(f"the chat template is not valid Jinja; {remedy}")


def limit_this_process() -> None:
    """Let this process end when it uses more time or memory than a template may."""
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    lower(resource.RLIMIT_CPU, used + SECONDS, used + SECONDS + 1)
    lower(resource.RLIMIT_CORE, 0, 0)
    if (pages := Path("/proc/self/statm")).is_file():
        memory = int(pages.read_text().split()[0]) * resource.getpagesize() + EXTRA_BYTES
        lower(resource.RLIMIT_AS, memory, memory)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def lower(which: int, soft: int, hard: int) -> None:
    """Set a limit of this process, or leave it where it is lower already."""
    _, most = resource.getrlimit(which)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(which, (soft, hard))


def rendered(template: str) -> int:
    """Render the template; return an exit code."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template([CHAT], chat_template=template, add_generation_prompt=True)
    except TemplateSyntaxError:
        return BROKEN
    except (MemoryError, OverflowError):
        return TOO_LARGE
    except Exception:  # of its own, for a chat that it does not take
        return 0
    return TOO_LARGE if len(text) > MOST_CHARACTERS else 0
