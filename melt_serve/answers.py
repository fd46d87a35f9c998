"""What a tokenizer's chat template says about answers: how they end, and whether they begin by thinking."""

import inspect
import json
from pathlib import Path
from typing import Any

THINK, END_THINK = "<think>", "</think>"
REPLY = "A reply."


def end_marks(tokenizer: Any) -> list[int]:
    """Return the token ids that end an answer: the tokenizer's own, and what its chat template puts after a reply.

    The two differ in Ouro's published files: the tokenizer names `<|endoftext|>`, turns end with `<|im_end|>`.

    Args:
        tokenizer: one of transformers'.

    Returns:
        At most two ids; the tokenizer's own comes first.
    """
    from jinja2 import TemplateError

    marks = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "A question."}, {"role": "assistant", "content": REPLY}], tokenize=False
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return marks  # there is no template, or it does not take such a chat
    if REPLY not in said:
        return marks
    after = said.rpartition(REPLY)[2].strip()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if after.startswith(token.content) and token.special and token_id not in marks:
            marks.append(token_id)
    return marks


def note_end_marks(folder: Path, tokenizer: Any) -> None:
    """Write into a checkpoint's `generation_config.json` which tokens end an answer; what is stated already stays.

    Where there is no such file, `config.json` states it.
    """
    path, config = folder / "generation_config.json", folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    other = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    stated = fields.get("eos_token_id", other.get("eos_token_id"))
    marks = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    marks += [mark for mark in end_marks(tokenizer) if mark not in marks]
    if not marks:
        return
    path.write_text(json.dumps({**fields, "eos_token_id": marks}, indent=2) + "\n", encoding="utf-8")


def opens_thinking(tokenizer: Any, **options: object) -> bool:
    """Return whether the template itself opens a `<think>` that the answer has to close.

    Args:
        options: the request's `chat_template_kwargs`.
    """
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerBase

    question = [{"role": "user", "content": "A question."}]
    # Names of the method's own arguments, a template among them, are not for clients. (vLLM's tokenizers hide theirs.)
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    options = {name: value for name, value in options.items() if name not in own}
    try:
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return False
    return prompt.rstrip().endswith(THINK)
