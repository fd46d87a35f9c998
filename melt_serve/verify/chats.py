"""What only chats show of a checkpoint: where answers end, whether reasoning is apart from them, what efforts mean."""

from collections.abc import Iterator, Sequence
from typing import Any

from openai import BadRequestError

from melt_serve.answers import END_THINK, THINK, end_marks, opens_thinking
from melt_serve.verify.client import ChatAnswer
from melt_serve.verify.parity import Reference, compare
from melt_serve.verify.record import Check
from melt_serve.verify.served import Served

CERTAIN = 100
"""What is added to a token's logit so that it comes next, whatever the model says: the most that OpenAI's API takes."""
END_MARKS, ENDS, SPLITS, EFFORTS = "end marks", "answers end", "reasoning and answer", "reasoning_effort"


def check_chats(served: Served, reference: Reference | None, tolerance: float) -> Iterator[Check]:
    """Ask the checkpoint's questions as a chat, if it has a chat template."""
    target = served.target
    try:
        served.client.chat(target.questions[0], 1)
    except BadRequestError as error:
        if "chat template" not in str(error):
            raise
        yield from (Check.skip(name, "there is no chat template") for name in (END_MARKS, ENDS, SPLITS, EFFORTS))
        return
    yield check_end_marks(served)
    answers = served.client.chat_at_once(target.questions, target.longest_answer)
    yield check_ends(answers, end_marks(target.tokenizer), target.longest_answer)
    yield check_splits(answers, target.tokenizer)
    yield check_efforts(served, reference, tolerance)


def check_end_marks(served: Served) -> Check:
    """Check that an answer ends at each token that the tokenizer or its chat template ends one with."""
    tokenizer, passed = served.target.tokenizer, []
    marks = end_marks(tokenizer)
    for mark in marks:
        answer = served.client.chat(served.target.questions[0], 2, bias={mark: CERTAIN})
        if answer.ended != "stop" or len(answer.tokens) > 1:
            passed.append(mark)
    names = ", ".join(tokenizer.convert_ids_to_tokens(marks))
    measured = f"goes on after {', '.join(tokenizer.convert_ids_to_tokens(passed))}" if passed else names or "none"
    return Check.judge(END_MARKS, bool(marks) and not passed, measured, names or "at least one", marks=marks)


def check_ends(answers: Sequence[ChatAnswer], marks: Sequence[int], longest: int) -> Check:
    """Check that answers end at an end mark. Whether one is reached in so few tokens is for the checkpoint to say."""
    past = sum(any(token in marks for token in answer.tokens[:-1]) for answer in answers)
    ended = sum(answer.ended == "stop" for answer in answers)
    if not ended and not past:
        return Check.skip(ENDS, f"none came to an end within {longest} tokens: raise --answer-tokens")
    measured = f"{ended} of {len(answers)} at an end mark" + (f", {past} went on after one" if past else "")
    return Check.judge(ENDS, not past, measured, "none goes on after one", ended=ended, asked=len(answers))


def check_splits(answers: Sequence[ChatAnswer], tokenizer: Any) -> Check:
    """Check that the server tells apart as reasoning what stands between `<think>` and `</think>`, and nothing else."""
    if not {THINK, END_THINK} <= tokenizer.get_vocab().keys():
        return Check.skip(SPLITS, f"the tokenizer has no {THINK} and {END_THINK}")
    opened, wrong, thought = opens_thinking(tokenizer), 0, 0
    for answer in answers:
        reasoning, content = split(as_written(answer.tokens, tokenizer), opened)
        thought += bool(reasoning)
        wrong += (words(answer.reasoning), words(answer.content)) != (words(reasoning), words(content))
    measured = f"{wrong} of {len(answers)} not split at their tags" if wrong else f"{thought} of {len(answers)} reason"
    return Check.judge(SPLITS, not wrong, measured, "split where tags are", reasoned=thought, wrong=wrong)


def as_written(tokens: Sequence[int], tokenizer: Any) -> str:
    """Return an answer's text with its tags, and without other special tokens."""
    ids = set(tokenizer.all_special_ids) | {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    hidden = ids - set(tokenizer.convert_tokens_to_ids([THINK, END_THINK]))
    return tokenizer.decode([token for token in tokens if token not in hidden], skip_special_tokens=False)


def split(text: str, opened: bool) -> tuple[str, str]:
    """Split an answer into reasoning and content; `opened` if its prompt has opened the tag."""
    if not opened and THINK not in text and END_THINK not in text:
        return "", text
    before, tag, rest = text.partition(THINK)
    if not tag:
        before, rest = "", text
    reasoning, _, content = rest.partition(END_THINK)
    return reasoning, before + content


def words(text: str | None) -> str:
    """Return a text without white space, which parsers cut off at tags."""
    return "".join((text or "").split())


def check_efforts(served: Served, reference: Reference | None, tolerance: float) -> Check:
    """Check that each `reasoning_effort` runs its loops, leaves the prompt alone, and answers as the reference does.

    `none` may change the prompt: it asks the chat template not to reason, too.
    """
    config = served.target.config
    wrong, apart, prompts = [], 0.0, set()
    for effort, loops in config.loops_by_effort.items():
        answer = served.client.chat(served.target.questions[0], served.target.generated, effort, logprobs=True)
        if answer.loops is None or not answer.loops["mean"] == answer.loops["max"] == loops:
            wrong.append(f"{effort} ran {'untold' if answer.loops is None else answer.loops['mean']}, not {loops}")
        if effort != "none":
            prompts.add(tuple(answer.prompt))
        if reference is not None:
            apart = max(apart, compare(Reference(reference.exact, None), [answer], {"loops": loops}).distance)
    if len(prompts) > 1:
        wrong.append(f"prompts of {', '.join(str(len(each)) for each in sorted(prompts))} tokens")
    means = ", ".join(f"{effort} {loops}" for effort, loops in config.loops_by_effort.items())
    measured = "; ".join(wrong) or ("their loops" + (f", {apart:.4f} apart in probability" if reference else ""))
    expected = f"{means}; one prompt; at most {tolerance:.4f}"
    return Check.judge(EFFORTS, not wrong and apart <= tolerance, measured, expected, distance=apart)
