"""The server's probabilities of tokens against those of the reference model, in float32 on the CPU."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from melt_serve.config import DecodeMode, LoopLMConfig, weight_shapes
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.verify.client import TOP, Answer, Asked, Depth, Row
from melt_serve.verify.record import Check
from melt_serve.verify.served import Served

Model = MeltForCausalLM | OuroForCausalLM

ROUNDING = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 0.02}
"""How far right answers may be apart, by the server's dtype, where the reference says that rounding does less."""
UNKNOWN_ROUNDING = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
"""The same where no reference says what rounding does to this checkpoint."""
MOST_APART = 0.4
"""Of a probability: a tolerance near 1 would admit anything, however much the reference rounds."""
TIMES_ROUNDING = 4
"""How many times as far from the exact reference the server may be as the reference itself is in the server's dtype."""
LOOPS_ROUNDING = 0.1
"""How far the mean loops may be apart where tokens leave by an exit threshold, which rounding may tip."""
EXIT_THRESHOLD = 0.7
MEMORY_SHARE = 0.8
"""Of the memory that is available, which the reference may take."""
AT_ONCE = 5
"""Answers that the reference reads at once: it keeps a table over the vocabulary for each of their tokens."""


@dataclass(frozen=True)
class Reference:
    """The reference model of a checkpoint.

    Attributes:
        exact: in float32.
        rounded: in the server's dtype; None if that is float32.
    """

    exact: Model
    rounded: Model | None

    @classmethod
    def load(cls, folder: Path, mode: DecodeMode | None, dtype: str) -> "Reference":
        """Load a checkpoint, to be decoded in `mode`."""
        disable_progress_bar()
        models = []
        for each in dict.fromkeys(("float32", dtype)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, each)).eval()
            if mode:
                model.config.decode_mode = mode
            models.append(model)
        return cls(models[0], models[1] if len(models) > 1 else None)


@dataclass(frozen=True)
class Parity:
    """Answers at one depth, held against the reference.

    Attributes:
        distance: the largest difference of a token's probability, or their mean.
        rounding: the same between the exact and the rounded reference.
        tokens: generated ones.
        same: of them, those that the reference would have taken, too.
        mean_loops: that the reference ran for them.
    """

    distance: float
    rounding: float
    tokens: int
    same: int
    mean_loops: float


def why_no_reference(config: LoopLMConfig, info: dict[str, Any]) -> str | None:
    """Return why the reference cannot be held against this server; None if it can."""
    if getattr(config, "quantization_config", None):
        return "the weights are quantized, the reference's are not"
    if info["kv_dtype"] != info["dtype"]:
        return f"the server keeps rows in {info['kv_dtype']}, the reference in {info['dtype']}"
    weights = sum(math.prod(shape) for _, shape in weight_shapes(config))
    needed = weights * (4 if info["dtype"] == "float32" else 6)
    available = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * available:
        return f"the reference takes {needed / 1e9:,.1f} GB of memory, and {available / 1e9:,.1f} GB are available"
    return None


def check_parity(served: Served, reference: Reference) -> Generator[Check, None, float]:
    """Check answers at every depth and their loops, and that another depth would be seen.

    Returns:
        How far right answers may be apart.
    """
    floor = ROUNDING[served.info["dtype"]]
    most = floor
    groups = ask_all_depths(served)
    for name, (asked, answers) in groups.items():
        exits = "exit_threshold" in asked[0].depth
        # Rounding may tip a token across its threshold, and then its probability jumps: the largest says nothing.
        found = compare(reference, answers, asked[0].depth, fmean if exits else max)
        tolerance = min(MOST_APART, max(floor, TIMES_ROUNDING * found.rounding))
        if not exits:
            most = max(most, tolerance)
        yield judge(f"as the reference, {name}", found, tolerance, " on average" if exits else "")
        yield judge_loops(name, answers, found, LOOPS_ROUNDING if exits and reference.rounded else 1e-6)
    if served.target.most_loops > 1:
        _, answers = next(iter(groups.values()))
        yield tells_depths_apart(served, reference, answers, most)
    return most


def ask_all_depths(served: Served) -> dict[str, tuple[list[Asked], list[Answer]]]:
    """Ask prompts of all lengths at all depths, exits included, all at once; return requests and answers by depth.

    The default depth, the first, is asked as many as the user wants.
    """
    target, asked = served.target, dict[str, list[Asked]]()
    exits: Depth = {"exit_threshold": EXIT_THRESHOLD}
    for name, depth in (*served.depths.items(), (f"exit threshold {EXIT_THRESHOLD}", exits)):
        lengths = islice(cycle(target.lengths), len(target.lengths) if asked else target.prompts)
        prompts = [target.window(number, length) for number, length in enumerate(lengths)]
        asked[name] = [Asked(prompt, target.generated, depth) for prompt in prompts]
    answers = iter(served.client.complete_at_once([each for group in asked.values() for each in group], "parity"))
    return {name: (group, [next(answers) for _ in group]) for name, group in asked.items()}


def judge(name: str, found: Parity, tolerance: float, how: str) -> Check:
    """Judge how far answers are from the reference."""
    return Check.judge(
        name,
        found.distance <= tolerance,
        f"{found.distance:.4f} apart in probability{how}, {found.same} of {found.tokens} tokens the same",
        f"at most {tolerance:.4f}",
        distance=found.distance,
        tolerance=tolerance,
        same_tokens=found.same,
        tokens=found.tokens,
    )


def judge_loops(name: str, answers: Sequence[Answer], found: Parity, tolerance: float) -> Check:
    """Judge the loops that the answers say their tokens ran; all answers have as many tokens."""
    expected = f"{found.mean_loops:.2f} on average, as the reference"
    if any(answer.loops is None for answer in answers):
        return Check.judge(f"usage.loops, {name}", False, "not told", expected)
    told = sum(answer.loops["mean"] for answer in answers if answer.loops) / len(answers)
    right = abs(told - found.mean_loops) <= tolerance
    return Check.judge(f"usage.loops, {name}", right, f"{told:.2f} on average", expected, loops=told)


def tells_depths_apart(served: Served, reference: Reference, answers: Sequence[Answer], tolerance: float) -> Check:
    """Check that the default depth's answers are not those of a loop more or less: else parity would prove little."""
    default = served.target.config.total_ut_steps
    other = default - 1 or default + 1
    found = compare(Reference(reference.exact, None), answers, {"loops": other})
    return Check.judge(
        f"not as the reference with {other} loop{'s' if other > 1 else ''}",
        found.distance > tolerance,
        f"{found.distance:.4f} apart in probability",
        f"more than {tolerance:.4f}",
        distance=found.distance,
        tolerance=tolerance,
    )


def compare(
    reference: Reference, answers: Sequence[Answer], depth: Depth, of_all: Callable[[list[float]], float] = max
) -> Parity:
    """Hold answers against the reference at this depth; `of_all` makes one number of all tokens' differences."""
    apart: list[float] = []
    rounding: list[float] = []
    same, loops = 0, []
    exact = continuations(reference.exact, answers, depth)
    for answer, (logprobs, ran) in zip(answers, exact, strict=True):
        loops += ran
        for token, theirs, ours in zip(answer.tokens, answer.rows, logprobs, strict=True):
            apart.append(distance(theirs, row(ours, theirs)))
            same += token == int(ours.argmax())
    if reference.rounded is not None:
        rounded = continuations(reference.rounded, answers, depth)
        for (one, _), (other, _) in zip(exact, rounded, strict=True):
            rounding += [distance(row(here, {}), row(there, {})) for here, there in zip(one, other, strict=True)]
    tokens = sum(len(answer.tokens) for answer in answers)
    return Parity(of_all(apart or [0.0]), of_all(rounding or [0.0]), tokens, same, fmean(loops))


@torch.inference_mode()
def continuations(model: Model, answers: Sequence[Answer], depth: Depth) -> list[tuple[Tensor, list[int]]]:
    """Return what the model says before each token of each answer, and the loops that it ran there.

    Returns:
        For each answer, log-probabilities, [generated, vocabulary], and loops, [generated].
    """
    if len(answers) > AT_ONCE:
        return continuations(model, answers[:AT_ONCE], depth) + continuations(model, answers[AT_ONCE:], depth)
    whole = [torch.tensor([*answer.prompt, *answer.tokens[:-1]]) for answer in answers]
    output = model(
        pad_sequence(whole, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(tokens) for tokens in whole], batch_first=True),
        prompt_lengths=torch.tensor([len(answer.prompt) for answer in answers]),
        **depth,
    )
    said = []
    for number, answer in enumerate(answers):
        generated = slice(len(answer.prompt) - 1, len(answer.prompt) - 1 + len(answer.tokens))
        loops = output.depths[number, generated].tolist()
        said.append((output.logits[number, generated].float().log_softmax(-1), loops))
    return said


def row(logprobs: Tensor, beside: Row) -> Row:
    """Return the likeliest tokens of [vocabulary], and those that are listed in `beside`."""
    ids = {*logprobs.topk(min(TOP, len(logprobs))).indices.tolist(), *beside}
    return {token: logprobs[token].item() for token in ids}


def distance(one: Row, other: Row) -> float:
    """Return the largest difference of a token's probability.

    Log-probabilities themselves would be moved most by rounding where tokens are hardly ever drawn. A token that one of
    the two does not list is less likely to it than all it lists.
    """
    apart = 0.0
    for here, there in ((one, other), (other, one)):
        least = min(there.values())
        for token, value in here.items():
            difference = math.exp(value) - math.exp(there.get(token, least))
            apart = max(apart, abs(difference) if token in there else difference)
    return apart
