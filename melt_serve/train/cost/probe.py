"""Some real steps at a reduced shape: their speed, and what they keep for the backward pass."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from melt_serve.config import LoopLMConfig, shape_facts
from melt_serve.modeling import OuroForCausalLM
from melt_serve.train.cost.arithmetic import sequence_flops
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.build import DTYPES, student_config
from melt_serve.train.distil.phase import phase_losses
from melt_serve.train.distil.shared_base import share_base
from melt_serve.train.distil.student import Student
from melt_serve.train.recipe import PostTraining
from melt_serve.train.stages import Distillation

MEASURED_STEPS = 2


def reduced(teacher: LoopLMConfig, recipe: PostTraining, scale: int) -> tuple[LoopLMConfig, PostTraining]:
    """Return the same run with the width divided by `scale`, two layers, few words and sequences of two chunks.

    Loops, chunks and the shares of queries, rows and MLP stay, so that what grows with N * d can be scaled up again.
    """
    assert teacher.num_key_value_heads is not None
    heads = math.gcd(teacher.num_attention_heads, teacher.num_key_value_heads)
    fewer = math.gcd(heads, scale)
    facts = {key: value for key, value in shape_facts(teacher).items() if key != "layer_types"} | {
        "vocab_size": min(teacher.vocab_size, 512),
        "hidden_size": max(8, teacher.hidden_size // scale),
        "intermediate_size": max(8, teacher.intermediate_size // scale),
        "num_hidden_layers": min(teacher.num_hidden_layers, 2),
        "num_attention_heads": teacher.num_attention_heads // fewer,
        "num_key_value_heads": teacher.num_key_value_heads // fewer,
        "head_dim": max(2, teacher.head_dim * fewer // scale // 2 * 2),  # type: ignore[operator]
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    length = max(2, 2 * recipe.chunk_size)
    return LoopLMConfig(**facts), replace(recipe, sequence_length=length, batch_tokens=length * recipe.micro_batch)


def measured_rate(teacher_config: LoopLMConfig, recipe: PostTraining, stage: Distillation) -> float:
    """Measure FLOPs a second, the median of real steps of one micro-batch, on this machine's device."""
    student, loss = random_step(teacher_config, recipe, stage)
    student.checkpoint_chunks = recipe.checkpoint_chunks
    optimizer = AdamW(student.parameters(), lr=0.0)
    seconds = []
    for _ in range(1 + MEASURED_STEPS):  # the first one warms up
        begun = time.monotonic()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if student.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begun)
    return recipe.micro_batch * sequence_flops(student.config, recipe, as_tried(stage)) / median(seconds[1:])


def kept_for_backward(teacher: LoopLMConfig, recipe: PostTraining, stage: Distillation, scale: int) -> float:
    """Count the bytes kept within chunks: of the last one where chunks are recomputed, else of all."""
    return kept_by_length(teacher, recipe, stage, scale)(recipe.sequence_length)


def kept_by_length(
    teacher: LoopLMConfig, recipe: PostTraining, stage: Distillation, scale: int
) -> Callable[[int], float]:
    """Count `kept_for_backward`, and return it as a function of a sequence's tokens.

    Counted at two small widths, for all of it is linear in the width, the layers, and the rows a chunk sees. Of three
    chunks, as the first keeps less: with a frozen base it has nothing to train before its second loop.
    """
    size = recipe.grid  # the largest that a batch may draw keeps most
    recipe = replace(recipe, chunk_size=size)
    widths, counted = [], []
    for each in (2 * scale, scale):
        small_teacher, small = reduced(teacher, recipe, each)
        small = replace(small, sequence_length=3 * size, batch_tokens=3 * size * recipe.micro_batch)
        student, loss = random_step(small_teacher, small, stage)
        with kept_bytes(student) as counts:
            loss()
        _, second, third = (after - before for before, after in zip(counts[::2], counts[1::2], strict=True))
        widths.append(small_teacher.hidden_size)
        counted.append([kept / small_teacher.num_hidden_layers for kept in (second, third)])
    beyond = (teacher.hidden_size - widths[0]) / (widths[1] - widths[0])
    second, third = (
        teacher.num_hidden_layers * (kept + beyond * (more - kept)) for kept, more in zip(*counted, strict=True)
    )

    def kept(length: int) -> float:
        chunks = max(1.0, length / size)
        last, middle = (second + (chunk - 2) * (third - second) for chunk in (chunks, (1 + chunks) / 2))
        return last if recipe.checkpoint_chunks else chunks * middle

    return kept


def random_step(
    teacher_config: LoopLMConfig, recipe: PostTraining, stage: Distillation
) -> tuple[Student, Callable[[], Tensor]]:
    """Build a student with random weights, and a step's loss on random tokens, all learnt, at most loops and passes."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[recipe.dtype]
    torch.manual_seed(recipe.seed)
    teacher = OuroForCausalLM(teacher_config).to(device, dtype).eval().requires_grad_(False)
    student = Student(student_config(recipe, teacher_config)).to(device, dtype).train()
    if recipe.train_base != "full":
        share_base(student, teacher, recipe.lora_rank)
    ids = torch.randint(teacher_config.vocab_size, (recipe.micro_batch, recipe.sequence_length), device=device)
    batch = Batch(ids, torch.ones_like(ids), ids, torch.zeros(len(ids), dtype=torch.long, device=device), ids[:1])
    deepest = as_tried(stage)

    def loss() -> Tensor:
        middle = stage.steps // 2
        return phase_losses(deepest, middle, 0, teacher, student, batch, ids.numel(), batch.real.sum())["loss"]

    return student, loss


def as_tried(stage: Distillation) -> Distillation:
    """Return the stage of which `random_step` is a step: its most loops, and two passes always if it ever has them.

    C is the recipe's: a drawn one would not be this recipe's, which may be a reduced one.
    """
    twice = stage.decode_aware_by == "passes" and stage.decode_aware_from < 1
    return replace(
        stage,
        loops=(max(stage.loops),),
        chunk_sizes=(),
        decode_aware_from=0.0 if twice else 1.0,
        decode_aware_share=1.0,
    )


@contextmanager
def kept_bytes(student: Student) -> Iterator[list[int]]:
    """Collect the bytes kept for the backward pass, weights left out: before and after each chunk."""
    counts: list[int] = []
    kept: dict[int, Tensor] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in student.parameters()}
    run_chunk = student.run_chunk

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor  # so that its address is not used again
        return tensor

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def counted(*arguments: Any) -> list[Tensor]:
        counts.append(size())
        states = run_chunk(*arguments)
        counts.append(size())
        return states

    student.run_chunk = counted  # type: ignore[method-assign, assignment]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield counts
    finally:
        del student.run_chunk
