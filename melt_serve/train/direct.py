"""Trains the bundled MELT from nothing, without a teacher: cross-entropy on the replies, at every loop."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from melt_serve.modeling import MeltConfig, MeltForCausalLM
from melt_serve.train.tasks import Question, questions
from melt_serve.train.tokenizer import MAX_TOKENS, VOCABULARY, build_tokenizer

IGNORED = -100
HELDOUT_SEED = 1


@dataclass(frozen=True)
class Recipe:
    """Everything the checkpoint depends on; all of it our choice.

    Attributes:
        warm_steps: steps at one loop, where a MELT is a plain transformer: the lookup is learnt four
            times faster there.
        melt_steps: steps at all loops on the chunk grid, from the weights of the stage before.
        decode_aware_every: in the second stage, one batch in this many runs its reply's tokens as
            chunks of their own, as serving decodes them in `token` mode.
        embedding_std, output_gain: at the start, a token's identity must not drown in what the
            sandwich norms (output scaled by the gain) add to the residual stream.
    """

    warm_steps: int = 350
    melt_steps: int = 450
    batch: int = 32
    learning_rate: float = 2e-3
    melt_learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    decode_aware_every: int = 4
    embedding_std: float = 1.0
    output_gain: float = 0.3
    seed: int = 0

    def config(self, tokenizer: PreTrainedTokenizerFast) -> MeltConfig:
        """The model's shape: 2 layers run 4 times, chunks of 32 tokens."""
        return MeltConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            total_ut_steps=4,
            max_loops=4,
            chunk_size=32,
            decode_mode="token",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )


@dataclass(frozen=True)
class Batch:
    """Chats as the model reads them: `input_ids`, `labels` [B, S], right-padded; `prompt_lengths` [B]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_lengths: Tensor


def train(recipe: Recipe) -> tuple[MeltForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Run both stages; gives the model, its tokenizer and the loss of every step."""
    tokenizer = build_tokenizer()
    model = fresh_model(recipe, tokenizer)
    batches = stream(recipe, tokenizer)
    losses: list[float] = []
    grid = model.config.chunk_size
    # One loop does not see the grid, so the first stage may as well run in one piece.
    model.config.chunk_size = MAX_TOKENS
    losses += run_stage(model, batches, recipe, recipe.warm_steps, recipe.learning_rate, loops=1)
    model.config.chunk_size = grid
    loops = model.config.total_ut_steps
    losses += run_stage(model, batches, recipe, recipe.melt_steps, recipe.melt_learning_rate, loops)
    return model.eval(), tokenizer, losses


def fresh_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> MeltForCausalLM:
    """The model before its first step."""
    torch.manual_seed(recipe.seed)
    model = MeltForCausalLM(recipe.config(tokenizer)).train()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=recipe.embedding_std)
        model.lm_head.weight.copy_(0.1 * model.model.embed_tokens.weight)
        for layer in model.model.layers:
            layer.input_layernorm_2.weight.fill_(recipe.output_gain)
            layer.post_attention_layernorm_2.weight.fill_(recipe.output_gain)
    return model


def run_stage(
    model: MeltForCausalLM, batches: Iterator[Batch], recipe: Recipe, steps: int, learning_rate: float, loops: int
) -> list[float]:
    """Train for `steps` batches at `loops` loops; gives the loss of every step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    losses = []
    bar = tqdm(islice(batches, steps), total=steps, desc=f"loops={loops}", unit="step")
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / recipe.warmup) * cosine(step / steps)
        decode_aware = loops > 1 and step % recipe.decode_aware_every == 0
        loss = loss_at_every_loop(model, batch, loops, decode_aware)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def cosine(progress: float, floor: float = 0.02) -> float:
    """The share of the learning rate left after this share of the steps."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def loss_at_every_loop(model: MeltForCausalLM, batch: Batch, loops: int, decode_aware: bool) -> Tensor:
    """Next-token cross-entropy on the replies, mean over loops and tokens."""
    logits = model(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        loops=loops,
        output_loops=True,
        prompt_lengths=batch.prompt_lengths if decode_aware else None,
    ).loop_logits[:, :, :-1]
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORED
    return F.cross_entropy(logits[:, supervised].flatten(0, 1), targets[supervised].repeat(loops))


def stream(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Endless training batches, the same for the same seed."""
    endless = questions("train", recipe.seed)
    while True:
        yield encode(list(islice(endless, recipe.batch)), tokenizer)


def encode(asked: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Questions with their replies, loss on the replies and the end mark only."""
    prompts = [prompt_ids(question, tokenizer) for question in asked]
    replies = [tokenizer.encode(question.reply + tokenizer.eos_token) for question in asked]
    rows = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    labels = [torch.tensor([IGNORED] * len(prompt) + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    labels_padded = pad(labels, batch_first=True, padding_value=IGNORED)
    return Batch(
        input_ids=pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        attention_mask=pad([torch.ones_like(row) for row in rows], batch_first=True),
        labels=labels_padded,
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
    )


def prompt_ids(question: Question, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The question through the chat template, ready for the assistant to speak."""
    messages = [{"role": "user", "content": question.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@torch.inference_mode()
def accuracy(
    model: MeltForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, loops: int | None = None, batch: int = 100
) -> float:
    """The share of `count` held-out questions answered right, greedily, through `generate`."""
    asked = list(islice(questions("heldout", HELDOUT_SEED), count))
    depth = {} if loops is None else {"loops": loops}
    right = 0
    for first in tqdm(range(0, count, batch), desc=f"held out, loops={loops or 'default'}", unit="batch"):
        part = asked[first : first + batch]
        padded = tokenizer.pad(
            {"input_ids": [prompt_ids(question, tokenizer) for question in part]}, return_tensors="pt"
        )
        output = model.generate(**padded, **depth, max_new_tokens=24, do_sample=False)
        replies = tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            question.check(reply.partition("</think>")[2]) for question, reply in zip(part, replies, strict=True)
        )
    return right / count


def make_checkpoint(target: Path, recipe: Recipe, evaluated: int = 1000) -> dict[int, float]:
    """Train, measure, and write a checkpoint with its card; gives the accuracy by loops.

    `target` is replaced only when everything is done: a run that is stopped leaves it as it was.
    """
    started = time.monotonic()
    model, tokenizer, losses = train(recipe)
    minutes = (time.monotonic() - started) / 60
    scores = {loops: accuracy(model, tokenizer, evaluated, loops) for loops in (1, 2, 4)}
    part = target.with_name(f".{target.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card(model, recipe, losses, minutes, scores, evaluated), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return scores


def card(
    model: MeltForCausalLM,
    recipe: Recipe,
    losses: Sequence[float],
    minutes: float,
    scores: dict[int, float],
    evaluated: int,
) -> str:
    """The checkpoint's model card."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    table = "\n".join(f"| {loops} | {score:.1%} |" for loops, score in scores.items())
    return f"""\
---
license: apache-2.0
library_name: melt_serve
---

# melt-demo

A Memory-Efficient Looped Transformer of {weights:,} weights: {config.num_hidden_layers} layers of width \
{config.hidden_size} run {config.total_ut_steps} times, chunks of {config.chunk_size} tokens, `{config.decode_mode}` \
decode mode. It answers one kind of question, made up endlessly by `melt_serve.train.tasks`: find the one fact a
story hides, and say who, what or where. It shows MELT at work and knows nothing else.

Trained directly, without a teacher: {recipe.warm_steps} steps at one loop, then {recipe.melt_steps} at \
{config.total_ut_steps} loops on the chunk grid, batches of {recipe.batch}, one in {recipe.decode_aware_every} of them
decoded token by token; seed {recipe.seed}; last loss {losses[-1]:.4f}. Training took {minutes:.0f} minutes on 2 CPU
cores. Remake it with

    python -m melt_serve.train demo

which also measures this table: {evaluated:,} held-out questions, greedy, whole answers right, reference model in
`{config.decode_mode}` mode.

| loops | right |
|---|---|
{table}

Depth is not what this task needs: it was chosen to be easy, not to tell loops apart.
"""
