"""All checks in their order: one server for each decode mode, one for the LoopLM, then what `bench` measures."""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from openai import OpenAIError
from transformers import AutoTokenizer

from melt_serve.checkpoint_config import load_config
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig
from melt_serve.server_process import ServerError, tail
from melt_serve.task.evaluate import heldout
from melt_serve.verify.chats import check_chats
from melt_serve.verify.contract import check_contract, check_flat_memory, check_no_waits, check_wrong_depths
from melt_serve.verify.parity import UNKNOWN_ROUNDING, Reference, check_parity, why_no_reference
from melt_serve.verify.record import Check, VerifyError
from melt_serve.verify.served import MOST_ANSWER_TOKENS, Served, Target, served
from melt_serve.verify.speed import check_kernels, check_speed
from melt_serve.verify.start import check_files, check_start

QUESTIONS = 20
"""Of the bundled task: their text is what prompts are cut out of, where none is given."""
LEAST_TOKENS = 64
CHATS = 4
"""Questions that a chat model is asked."""
QUESTION = 200
"""Characters of one, where it is cut out of the user's text."""
PROMPTS = 20
"""That the reference answers, too, at the default depth."""
QUICK = "left out by --quick"


@dataclass(frozen=True)
class Options:
    """What to verify.

    Attributes:
        checkpoint: the folder.
        looplm: a LoopLM's, checked beside it; None for none.
        reference: the folder that the reference model reads, usually the checkpoint's own.
        modes: decode modes of a MELT; None for both.
        text: what prompts are made of; None for the bundled task's questions.
        prompts: how many the reference answers, too, at the default depth; None for 20, or few if quick.
        answer_tokens: the most of an answer to a question.
        quick: one decode mode, no LoopLM and no speed.
        words: flags for the servers.
    """

    checkpoint: Path
    looplm: Path | None
    reference: Path | None
    modes: Sequence[DecodeMode] | None
    text: str | None
    prompts: int | None
    answer_tokens: int
    quick: bool
    words: Sequence[str]


def targets(options: Options) -> list[Target]:
    """Return what is served, one after the other.

    Raises:
        VerifyError: a folder without a checkpoint that we serve, a text too short, or answers too long.
    """
    if options.answer_tokens > MOST_ANSWER_TOKENS:
        raise VerifyError(f"--answer-tokens={options.answer_tokens} must be at most {MOST_ANSWER_TOKENS}")
    config = config_of(options.checkpoint)
    if not isinstance(config, MeltConfig):
        if options.modes or options.looplm:
            raise VerifyError(f"{options.checkpoint} is a LoopLM: --modes and --looplm go with a MELT")
        return [target(options, options.checkpoint, config, None)]
    own = config.decode_mode
    modes = options.modes or ([own] if options.quick else [own, "chunk" if own == "token" else "token"])
    found = [target(options, options.checkpoint, config, mode) for mode in modes]
    if options.looplm:
        other = config_of(options.looplm)
        if isinstance(other, MeltConfig):
            raise VerifyError(f"--looplm {options.looplm} is a MELT: name the LoopLM that it came from")
        found.append(target(options, options.looplm, other, None))
    return found


def config_of(folder: Path) -> LoopLMConfig:
    """Read a checkpoint's config.

    Raises:
        VerifyError: there is none, or it is of another model.
    """
    try:
        return load_config(folder)
    except CheckpointError as error:
        raise VerifyError(str(error)) from None


def target(options: Options, folder: Path, config: LoopLMConfig, mode: DecodeMode | None) -> Target:
    """Return one checkpoint in one mode, with the text as its own tokens.

    Raises:
        VerifyError: the text has too few tokens, or the folder no tokenizer.
    """
    asked = heldout(QUESTIONS)
    text = " ".join(f"{each.prompt} {each.reply}" for each in asked) if options.text is None else options.text
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stream = tokenizer.encode(text)
    except (OSError, ValueError) as error:
        raise VerifyError(f"{folder} has no tokenizer that can be read: {error}") from None
    if len(stream) < LEAST_TOKENS:
        raise VerifyError(f"--text has {len(stream)} tokens: give at least {LEAST_TOKENS}")
    if (most := max(stream)) >= config.vocab_size:
        raise VerifyError(f"{folder}: the tokenizer knows token {most}, the model only {config.vocab_size}")
    questions = [each.prompt for each in asked[:CHATS]]
    if options.text:
        questions = [part for at in range(CHATS) if (part := options.text[at * QUESTION : (at + 1) * QUESTION].strip())]
    return Target(
        folder=folder,
        config=config,
        mode=mode,
        tokenizer=tokenizer,
        questions=questions[:2] if options.quick else questions,
        stream=stream,
        prompts=options.prompts or (3 if options.quick else PROMPTS),
        answer_tokens=options.answer_tokens,
        quick=options.quick,
        cuda=torch.cuda.is_available(),
        words=options.words,
    )


def checks(
    options: Options, found: Sequence[Target], starting: Callable[[str, float], None]
) -> Generator[Check, None, None]:
    """Yield every check as it is made.

    Args:
        found: what `targets` returned.
        starting: called once a second while a server starts, with its part and the seconds.
    """
    checked: set[Path] = set()
    for each in found:
        if each.folder not in checked:
            checked.add(each.folder)
            yield replace(check_files(each.folder), part=each.part)
        folder = options.reference if options.reference and each.folder == options.checkpoint else each.folder
        for check in checks_of_server(each, folder, partial(starting, each.part)):
            yield replace(check, part=each.part)
    if options.quick:
        for name in ("the other decode mode and the LoopLM", "tokens a second", "kernels against copy bandwidth"):
            yield replace(Check.skip(name, QUICK), part="speed" if "mode" not in name else "servers")
        return
    speed = check_speed(found[0]) if found[0].mode else iter([Check.skip("tokens a second", "there is no MELT")])
    for check in chain(speed, check_kernels(found[0].cuda)):
        yield replace(check, part="speed")


def checks_of_server(target: Target, reference: Path, progress: Callable[[float], None]) -> Iterator[Check]:
    """Start a server, check it, and stop it. If it fails, that is a check, too."""
    try:
        with served(target, progress) as server:
            try:
                yield from checks_of_running(server, reference)
            except (OpenAIError, OSError) as error:
                last = tail(server.log, lines=3)
                yield Check.judge("answers", False, one_line(f"{error}; its last lines: {last}"), "an answer")
    except (ServerError, OpenAIError, OSError) as error:
        yield Check.judge("start", False, one_line(str(error)), "ready")


def checks_of_running(server: Served, folder: Path) -> Iterator[Check]:
    """Check a server that is ready."""
    config, mode = server.target.config, server.target.mode
    yield from check_start(server)
    yield check_wrong_depths(server)
    tolerance, reference = UNKNOWN_ROUNDING[server.info["dtype"]], None
    if reason := why_no_reference(config, server.info):
        yield Check.skip("as the reference", reason)
    else:
        reference = Reference.load(folder, mode, server.info["dtype"])
        tolerance = yield from check_parity(server, reference)
    yield from check_chats(server, reference, tolerance)
    yield from check_contract(server, tolerance)
    yield check_flat_memory(server)
    yield check_no_waits(server)


def one_line(text: str) -> str:
    """Return a message in one line, its end if it is long: that is where a log says why."""
    line = " ".join(text.split())
    return line if len(line) <= 600 else f"... {line[-600:]}"


def show_start(part: str, seconds: float) -> None:
    """Show that a server is starting: in one line of a terminal, or in a line every ten seconds."""
    if sys.stdout.isatty():
        print(f"\r        {part}: starting the server ... {seconds:3.0f} s ", end="", flush=True)
    elif int(seconds) % 10 == 0:
        print(f"        {part}: starting the server ... {seconds:.0f} s", flush=True)
