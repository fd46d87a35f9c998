"""How many held-out questions a checkpoint answers right, by loops and decode mode: `melt-serve eval`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.columns import columns
from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.data import prompt_ids
from melt_serve.train.tasks import NAMES, PLACES, SENTENCES, Question, questions

HELDOUT_SEED = 1
BATCH = 100
CONNECTIONS = 16


class EvaluationError(ValueError):
    """What was asked for cannot be evaluated; the message says why."""


@dataclass(frozen=True)
class Score:
    """One line of the table; `chunk_size` and `decode_mode` are a MELT's, `loops` unknown of a server."""

    checkpoint: str
    loops: int | None
    chunk_size: int | None
    decode_mode: DecodeMode | None
    questions: int
    accuracy: float


def heldout(count: int) -> list[Question]:
    """The first questions of the held-out set, which is the same for everyone."""
    return list(islice(questions("heldout", HELDOUT_SEED), count))


def evaluate_checkpoints(
    paths: Sequence[Path], count: int, loops: Sequence[int] | None = None, modes: Sequence[DecodeMode] | None = None
) -> list[Score]:
    """Score LoopLM and MELT checkpoints with the reference model in float32, greedily.

    Args:
        paths: folders; none for the bundled ones.
        loops: depths to run, by default the checkpoint's own.
        modes: a MELT's decode modes, by default its own.

    Raises:
        EvaluationError: not a checkpoint of ours, or too many loops. Before anything is run.
        OSError: files that cannot be read.
    """
    paths = paths or (LOOPLM, MELT)
    configs = [AutoConfig.from_pretrained(path) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        if not isinstance(config, LoopLMConfig):
            raise EvaluationError(f"{path} is a {config.model_type!r} model; only 'melt' and 'ouro' can be evaluated")
        if loops and isinstance(config, MeltConfig) and max(loops) > config.max_loops:  # type: ignore[operator]
            raise EvaluationError(f"{path} runs at most max_loops={config.max_loops} loops, not {max(loops)}")
    scores = []
    for path, config in zip(paths, configs, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        scores += score(model, tokenizer, Path(path).name, loops or [config.total_ut_steps], count, modes)
    return scores


def score(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    loops: Sequence[int],
    count: int,
    modes: Sequence[DecodeMode] | None = None,
) -> list[Score]:
    """The model's table: a line for each depth, and of a MELT for each decode mode."""
    asked = heldout(count)
    if not isinstance(model, MeltForCausalLM):
        return [Score(name, t, None, None, count, accuracy(model, tokenizer, asked, t, name)) for t in loops]
    own, scores = model.config.decode_mode, []
    for mode in modes or [own]:
        model.config.decode_mode = mode
        for t in loops:
            right = accuracy(model, tokenizer, asked, t, f"{name} {mode}")
            scores.append(Score(name, t, model.config.chunk_size, mode, count, right))
    model.config.decode_mode = own
    return scores


@torch.inference_mode()
def accuracy(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Question],
    loops: int,
    label: str = "",
) -> float:
    """The share of questions answered right by `generate`, greedily."""
    right = 0
    for first in tqdm(range(0, len(asked), BATCH), desc=f"{label} T={loops}", unit="batch", leave=False):
        part = asked[first : first + BATCH]
        right += sum(
            question.check(reply) for question, reply in zip(part, answers(model, tokenizer, part, loops), strict=True)
        )
    return right / len(asked)


def answers(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Question],
    loops: int,
) -> list[str]:
    """What the model says after its reasoning, one batch."""
    prompts = tokenizer.pad({"input_ids": [prompt_ids(question, tokenizer) for question in asked]}, return_tensors="pt")
    output = model.generate(**prompts, loops=loops, max_new_tokens=longest_reply(tokenizer), do_sample=False)
    replies = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.partition("</think>")[2] for reply in replies]


def longest_reply(tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens of the longest right reply, its end mark included."""
    chain = " ".join(["Follow", *NAMES[:SENTENCES], PLACES[0]])
    return len(tokenizer.encode(f"<think>{chain}</think>In {PLACES[0]}.")) + 1


def evaluate_server(url: str, count: int) -> Score:
    """Score what an OpenAI-compatible server answers, greedily; with or without a reasoning parser.

    Raises:
        EvaluationError: nobody answers there, or not as a chat model does.
    """
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(question: Question) -> bool:
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": question.prompt}], temperature=0
        )
        # Without a reasoning parser, the reasoning still stands in front of the answer.
        return question.check((reply.choices[0].message.content or "").rpartition("</think>")[2])

    try:
        name = client.models.list().data[0].id
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            right = sum(tqdm(pool.map(ask, heldout(count)), total=count, desc=name, unit="question", leave=False))
    except OpenAIError as error:
        raise EvaluationError(f"{url}: {error}") from None
    return Score(name, None, None, None, count, right / count)


def table(scores: Sequence[Score]) -> str:
    """The scores in columns."""
    lines: list[tuple[str, ...]] = [("checkpoint", "loops", "C", "mode", "questions", "right")]
    for each in scores:
        facts = (each.loops, each.chunk_size, each.decode_mode)
        known = ["-" if fact is None else str(fact) for fact in facts]
        lines.append((each.checkpoint, *known, f"{each.questions:,}", f"{each.accuracy:.1%}"))
    return columns(lines)
