"""How many held-out questions a checkpoint answers right, by loops, exits and decode mode: `melt-serve eval`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from melt_serve.answers import END_THINK, end_marks
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.checkpoint_check import check_checkpoint
from melt_serve.checkpoint_config import load_config, read_fields, refuse_quantized
from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.task.tokenizer import prompt_ids
from melt_serve.task.who_is_where import NAMES, PLACES, SENTENCES, Question, questions
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from openai import OpenAI


HELDOUT_SEED = 1
BATCH = 100
CONNECTIONS = 16
RETRIES = 2
"""Retries per question when the server is busy, with growing pauses."""


class EvaluationError(ValueError):
    """What was asked for cannot be evaluated; the message says why."""


@dataclass(frozen=True)
class Score:
    """How a checkpoint did at one depth; `chunk_size`, `decode_mode` and `exit_threshold` are a MELT's.

    Attributes:
        loops: the most that a token runs; unknown of a server, and so are `mean_loops`.
        mean_loops: over the tokens of prompts and replies.
        accuracy: the share of right answers.
        contrast: of the last loop to half of the loops; 0 for none.
    """

    checkpoint: str
    loops: int | None
    chunk_size: int | None
    decode_mode: DecodeMode | None
    exit_threshold: float | None
    mean_loops: float | None
    questions: int
    accuracy: float
    contrast: float = 0.0


@dataclass(frozen=True)
class Reply:
    """A model's reply to one question.

    Attributes:
        answer: after its reasoning.
        tokens: that ran, of prompt and reply.
        loops: that they ran, all together.
    """

    answer: str
    tokens: int
    loops: int


def heldout(count: int) -> list[Question]:
    """Return the first questions of the held-out set, which is the same for everyone."""
    return list(islice(questions("heldout", HELDOUT_SEED), count))


def evaluate_checkpoints(
    paths: Sequence[Path],
    count: int,
    loops: Sequence[int] | None = None,
    modes: Sequence[DecodeMode] | None = None,
    thresholds: Sequence[float] | None = None,
    contrasts: Sequence[float] | None = None,
) -> list[Score]:
    """Score LoopLM and MELT checkpoints with the reference model in float32, greedily.

    Args:
        paths: folders; none for the bundled ones.
        loops: depths to run, by default the checkpoint's own.
        modes: a MELT's decode modes, by default its own.
        thresholds: a MELT's exit thresholds, by default its own.
        contrasts: weights of a contrast of depths, by default none.

    Raises:
        CheckpointError: not a checkpoint of ours, or not a whole one. Before anything is run.
        EvaluationError: too many loops, or too few for a contrast.
        OSError: files that cannot be read.
    """
    paths = paths or (LOOPLM, MELT)
    configs = [config_of(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        if loops and isinstance(config, MeltConfig) and max(loops) > config.max_loops:  # type: ignore[operator]
            raise EvaluationError(f"{path} runs at most max_loops={config.max_loops} loops, not {max(loops)}")
        if contrasts and max(contrasts) > 0 and min(loops or [config.total_ut_steps]) == 1:
            raise EvaluationError(f"{path}: a contrast needs a loop before the last one, so 2 loops or more, not 1")
    scores = []
    for path, config in zip(paths, configs, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Ouro's files name none
        depths = loops or [config.total_ut_steps]
        scores += score(model, tokenizer, Path(path).name, depths, count, modes, thresholds, contrasts)
    return scores


def config_of(folder: Path) -> LoopLMConfig:
    """Return the config of a checkpoint that was found whole.

    Raises:
        CheckpointError: it is not, or it is quantized.
    """
    config = load_config(folder)
    refuse_quantized(folder, read_fields(folder))
    check_checkpoint(folder, whole=False)
    return config


def score(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    loops: Sequence[int],
    count: int,
    modes: Sequence[DecodeMode] | None = None,
    thresholds: Sequence[float] | None = None,
    contrasts: Sequence[float] | None = None,
) -> list[Score]:
    """Score a model at each depth and contrast, and a MELT at each decode mode and exit threshold, too."""
    asked, weights, own_threshold = heldout(count), contrasts or [0.0], model.config.early_exit_threshold
    scores = []
    if not isinstance(model, MeltForCausalLM):
        for t, w in product(loops, weights):
            depth = {"loops": t, "exit_threshold": own_threshold, "contrast": w}
            facts = measure(model, tokenizer, asked, f"{name} T={t} w={w}", **depth)
            scores.append(Score(name, t, None, None, None, *facts, contrast=w))
        return scores
    own = model.config.decode_mode
    for mode, t, threshold, w in product(modes or [own], loops, thresholds or [own_threshold], weights):
        model.config.decode_mode = mode
        label = f"{name} {mode} T={t} exit={threshold} w={w}"
        facts = measure(model, tokenizer, asked, label, loops=t, exit_threshold=threshold, contrast=w)
        scores.append(Score(name, t, model.config.chunk_size, mode, threshold, *facts, contrast=w))
    model.config.decode_mode = own
    return scores


def measure(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Question],
    label: str,
    **depth: float,
) -> tuple[float, int, float]:
    """Return the mean loops of all tokens, the questions, and the share that `generate` answers right, greedily."""
    replies: list[Reply] = []
    for first in tqdm(range(0, len(asked), BATCH), desc=label, unit="batch", leave=False):
        replies += answers(model, tokenizer, asked[first : first + BATCH], **depth)
    right = sum(question.check(reply.answer) for question, reply in zip(asked, replies, strict=True))
    mean_loops = sum(reply.loops for reply in replies) / sum(reply.tokens for reply in replies)
    return mean_loops, len(asked), right / len(asked)


@torch.inference_mode()
def answers(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Question],
    **depth: float,
) -> list[Reply]:
    """Ask the model one batch of questions; `depth` are `loops`, `exit_threshold` and `contrast`."""
    prompts = tokenizer.pad({"input_ids": [prompt_ids(question, tokenizer) for question in asked]}, return_tensors="pt")
    prompt, lengths = prompts["input_ids"], prompts["attention_mask"].sum(-1)
    marks = end_marks(tokenizer)
    output = model.generate(
        **prompts, **depth, max_new_tokens=longest_reply(tokenizer), do_sample=False, eos_token_id=marks
    )
    reply = output[:, prompt.shape[1] :]
    ended = torch.isin(reply, torch.tensor(marks)).cumsum(-1) > 0
    ran = torch.cat((prompts["attention_mask"], (~ended).long()), dim=-1)
    if depth.get("exit_threshold", 1.0) < 1:
        again = model(output, attention_mask=ran, prompt_lengths=lengths, **depth)  # generate does not tell depths
        loops = again.depths.sum(-1)
    else:
        loops = ran.sum(-1) * int(depth["loops"])
    replies = [tokens[: int(length)] for tokens, length in zip(reply.tolist(), (~ended).sum(-1).tolist(), strict=True)]
    return [
        Reply(answer_of(tokens, tokenizer), *facts)
        for tokens, *facts in zip(replies, ran.sum(-1).tolist(), loops.tolist(), strict=True)
    ]


def answer_of(reply: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Decode what a reply says after its reasoning; the tags may be special tokens, as Ouro's are, or text."""
    return tokenizer.decode(reply, skip_special_tokens=False).partition(END_THINK)[2]


def longest_reply(tokenizer: PreTrainedTokenizerFast) -> int:
    """Count the tokens of the longest right reply, its end mark included."""
    chain = " ".join(["Follow", *NAMES[:SENTENCES], PLACES[0]])
    return len(tokenizer.encode(f"<think>{chain}</think>In {PLACES[0]}.")) + 1


def evaluate_server(url: str, count: int, model: str | None = None, api_key: str | None = None) -> Score:
    """Score what an OpenAI-compatible server answers, greedily; with or without a reasoning parser.

    Args:
        model: by its name there; by default the first that the server lists.
        api_key: by default OPENAI_API_KEY, or none.

    Raises:
        EvaluationError: nobody answers there, or not as a chat model does.
    """
    try:
        from openai import OpenAI, OpenAIError
    except ModuleNotFoundError:
        raise EvaluationError("asking a server needs the openai package: pip install openai") from None

    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    client = OpenAI(base_url=url, api_key=key, max_retries=RETRIES)

    def ask(question: Question) -> bool:
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": question.prompt}], temperature=0
        )
        # Without a reasoning parser, the reasoning still stands in front of the answer.
        return question.check((reply.choices[0].message.content or "").rpartition("</think>")[2])

    try:
        name = model or first_model(client)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            right = sum(tqdm(pool.map(ask, heldout(count)), total=count, desc=name, unit="question", leave=False))
    except OpenAIError as error:
        raise EvaluationError(f"{url}: {error}") from None
    return Score(name, None, None, None, None, None, count, right / count)


def first_model(client: "OpenAI") -> str:
    """Return the first model that a server lists.

    Raises:
        EvaluationError: it lists none.
    """
    models = client.models.list().data
    if not models:
        raise EvaluationError(f"{client.base_url} lists no models: name one with --model")
    return models[0].id


def table(scores: Sequence[Score]) -> str:
    """Format the scores in columns."""
    lines: list[tuple[str, ...]] = [
        ("checkpoint", "loops", "C", "mode", "exit", "contrast", "mean loops", "questions", "right")
    ]
    for each in scores:
        facts = (each.loops, each.chunk_size, each.decode_mode, each.exit_threshold, each.contrast or None)
        mean_loops = None if each.mean_loops is None else f"{each.mean_loops:.2f}"
        known = ["-" if fact is None else str(fact) for fact in (*facts, mean_loops)]
        lines.append((each.checkpoint, *known, f"{each.questions:,}", f"{each.accuracy:.1%}"))
    return columns(lines)
