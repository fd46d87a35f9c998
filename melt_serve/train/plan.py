"""`python -m melt_serve.train plan`: what a post-training takes, before it is started.

Letters as in `melt_serve.modeling`: T loops, N layers, S tokens of a sequence, d hidden size, C chunk size.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from melt_serve.columns import columns
from melt_serve.config import LoopLMConfig, MeltConfig, gate_width, kv_bytes_per_token, weight_shapes
from melt_serve.modeling import OuroForCausalLM
from melt_serve.plan import GB, shape_of
from melt_serve.train.data import Batch
from melt_serve.train.distil import phase_losses
from melt_serve.train.losses import ANSWERS_AT_ONCE
from melt_serve.train.posttrain import DTYPES, student_config
from melt_serve.train.recipe import Distillation, PostTraining
from melt_serve.train.recipe_files import RecipeError, load_recipe
from melt_serve.train.student import Student

MEASURED_STEPS = 2


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        memory: bytes on each device, by part.
        flops: of all its steps.
        seconds: of all its steps, extrapolated.
    """

    steps: int
    tokens: int
    memory: dict[str, int]
    flops: float
    seconds: float


def to_be_planned(recipe: str, overrides: Sequence[str]) -> tuple[PostTraining, LoopLMConfig]:
    """A recipe that may lack a teacher, data and output, and its teacher's shape, by default Ouro-1.4B's.

    Raises:
        RecipeError, PlanError: there is none, or it is no post-training.
    """
    defaults = {"teacher": "ouro-1.4b", "data": {"files": "-"}, "output": "-"}
    loaded = load_recipe(recipe, overrides, defaults)
    if not isinstance(loaded, PostTraining):
        raise RecipeError(f"{recipe} is of the bundled kind; only a post-training can be planned")
    return loaded, shape_of(loaded.teacher)


def plan(recipe: PostTraining, teacher: LoopLMConfig, processes: int, scale: int) -> dict[str, StagePlan]:
    """Every stage by name. Runs some steps of each at a shape `scale` times smaller, see `reduced`.

    Args:
        teacher: its shape.
        processes: devices that share the work.
    """
    small_teacher, small = reduced(teacher, recipe, scale)
    plans = {}
    for name, stage in recipe.stages.items():
        rate = measured_rate(small_teacher, small, small.stages[name])
        flops = stage.steps * recipe.sequences * sequence_flops(student_config(recipe, teacher), recipe, stage)
        plans[name] = StagePlan(
            steps=stage.steps,
            tokens=stage.steps * recipe.batch_tokens,
            memory=memory(teacher, recipe, stage, processes, kept_for_backward(teacher, recipe, stage, scale)),
            flops=flops,
            seconds=flops / rate / processes,
        )
    return plans


def reduced(teacher: LoopLMConfig, recipe: PostTraining, scale: int) -> tuple[LoopLMConfig, PostTraining]:
    """The same run with the width divided by `scale`, two layers, few words and sequences of two chunks.

    Loops, chunks and the shares of queries, rows and MLP stay, so that what grows with N * d can be scaled up again.
    """
    assert teacher.num_key_value_heads is not None
    facts = {key: value for key, value in teacher.to_dict().items() if key not in ("model_type", "architectures")}
    heads = math.gcd(teacher.num_attention_heads, teacher.num_key_value_heads)
    fewer = math.gcd(heads, scale)
    facts |= {
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


def sequence_flops(student: MeltConfig, recipe: PostTraining, stage: Distillation) -> float:
    """Of a sequence in a step: teacher forward, student forward and backward, and forward again where checkpointed.

    Matmuls and attention; a multiplication and an addition are two.
    """
    assert student.num_key_value_heads is not None and student.head_dim is not None
    d, length, loops = student.hidden_size, recipe.sequence_length, mean(stage.loops)
    q, kv = student.num_attention_heads * student.head_dim, student.num_key_value_heads * student.head_dim
    layer = 2 * d * (2 * q + 2 * kv + 3 * student.intermediate_size) + 2 * q * length  # half of the keys are visible
    extra = 4 * d * gate_width(student) + (4 * d * kv if stage.interpolate else 0)
    head = 2 * d * student.vocab_size
    layers, depth = student.num_hidden_layers, length * loops
    student_layers = depth * layers * (layer + extra)
    forward = depth * (layers * layer + head) + student_layers + depth * head
    again = student_layers if recipe.checkpoint_chunks else 0
    return forward + 2 * (student_layers + depth * head) + again


def measured_rate(teacher_config: LoopLMConfig, recipe: PostTraining, stage: Distillation) -> float:
    """FLOPs a second of real steps of one micro-batch, the median, on this machine's device."""
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
    deepest = replace(stage, loops=(max(stage.loops),))
    return recipe.micro_batch * sequence_flops(student.config, recipe, deepest) / median(seconds[1:])


def kept_for_backward(teacher: LoopLMConfig, recipe: PostTraining, stage: Distillation, scale: int) -> float:
    """Bytes kept within chunks: of the last one where chunks are run again, else of all.

    Counted at two small widths, for all of it is linear in the width, the layers, and the rows a chunk sees.
    """
    chunks = max(1.0, recipe.sequence_length / recipe.chunk_size)
    points = []
    for each in (2 * scale, scale):
        small_teacher, small = reduced(teacher, recipe, each)
        student, loss = random_step(small_teacher, small, stage)
        with kept_bytes(student) as counts:
            loss()
        first, second = (after - before for before, after in zip(counts[::2], counts[1::2], strict=True))
        last, middle = (first + (chunk - 1) * (second - first) for chunk in (chunks, (1 + chunks) / 2))
        kept = last if recipe.checkpoint_chunks else chunks * middle
        points.append((small_teacher.hidden_size, kept / small_teacher.num_hidden_layers))
    (width, kept), (wider, more) = points
    return teacher.num_hidden_layers * (kept + (teacher.hidden_size - width) * (more - kept) / (wider - width))


def random_step(
    teacher_config: LoopLMConfig, recipe: PostTraining, stage: Distillation
) -> tuple[Student, Callable[[], Tensor]]:
    """A student with random weights, and a step's loss on random tokens, all learnt, at the most loops."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[recipe.dtype]
    torch.manual_seed(recipe.seed)
    teacher = OuroForCausalLM(teacher_config).to(device, dtype).eval().requires_grad_(False)
    student = Student(student_config(recipe, teacher_config)).to(device, dtype).train()
    ids = torch.randint(teacher_config.vocab_size, (recipe.micro_batch, recipe.sequence_length), device=device)
    batch = Batch(ids, torch.ones_like(ids), ids, torch.zeros(len(ids), dtype=torch.long, device=device), ids[:1])
    deepest = replace(stage, loops=(max(stage.loops),), decode_aware_from=1.0)

    def loss() -> Tensor:
        middle = stage.steps // 2
        return phase_losses(deepest, middle, 0, teacher, student, batch, ids.numel(), batch.real.sum())["loss"]

    return student, loss


@contextmanager
def kept_bytes(student: Student) -> Iterator[list[int]]:
    """Bytes kept for the backward pass, weights left out: before and after each chunk."""
    counts: list[int] = []
    kept: dict[int, Tensor] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in student.parameters()}
    run_loops = student.run_loops

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor  # so that its address is not used again
        return tensor

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def counted(*arguments: Any) -> list[Tensor]:
        counts.append(size())
        states = run_loops(*arguments)
        counts.append(size())
        return states

    student.run_loops = counted  # type: ignore[method-assign, assignment]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield counts
    finally:
        del student.run_loops


def memory(
    teacher: LoopLMConfig,
    recipe: PostTraining,
    stage: Distillation,
    processes: int,
    kept: float,
) -> dict[str, int]:
    """Bytes on each device, by part; temporary copies are not counted.

    Args:
        kept: see `kept_for_backward`.
    """
    student, size = student_config(recipe, teacher), DTYPES[recipe.dtype].itemsize
    weights, of_teacher = (sum(math.prod(shape) for _, shape in weight_shapes(each)) for each in (student, teacher))
    sharded = processes > 1 or recipe.dtype != "float32"
    parts = {
        "weights, float32, sharded": 4 * weights / processes,
        f"weights gathered, {recipe.dtype}": size * weights * sharded,
        "gradients": 4 * weights * (1 + sharded / processes),
        "optimizer states": 8 * weights / processes,
        "teacher": size * of_teacher,
        **step_memory(teacher, recipe, stage, kept),
    }
    return {part: round(each) for part, each in parts.items()}


def step_memory(teacher: LoopLMConfig, recipe: PostTraining, stage: Distillation, kept: float) -> dict[str, float]:
    """Bytes that are there while a step runs, by part: `memory` without what is there between steps."""
    student, size = student_config(recipe, teacher), DTYPES[recipe.dtype].itemsize
    loops, tokens, again = max(stage.loops), recipe.micro_batch * recipe.sequence_length, recipe.checkpoint_chunks
    rows = tokens * kv_bytes_per_token(student, size)
    layer_states = student.num_hidden_layers * student.hidden_size * tokens * size
    logits = min(ANSWERS_AT_ONCE, loops * tokens) * student.vocab_size * (3 * size + 5 * 4)
    if again:
        logits = max(0.0, logits - kept)  # they are gone before the last chunk runs again
    return {
        "teacher's attention outputs": loops * layer_states if stage.alignment else 0,
        "final rows and gradients": 2 * rows if again else 0,
        "phase 1's rows per loop and gradients": 2 * loops * rows if again and stage.interpolate else 0,
        "embeddings, states of every loop, their gradients": (2 * loops + 1) * tokens * student.hidden_size * size,
        "kept for backward, of the last chunk" if again else "kept for backward": kept,
        "logits of the loss, beyond the last chunk" if again else "logits of the loss": logits,
        "gradient of the head": student.vocab_size * student.hidden_size * (2 * size + 4),
    }


def table(plans: dict[str, StagePlan]) -> str:
    """Steps, memory and time in columns; GB are 10^9 bytes."""
    all_steps = [("", *plans, "together")]
    for what, values in (
        ("steps", [each.steps for each in plans.values()]),
        ("tokens", [each.tokens for each in plans.values()]),
    ):
        all_steps.append((what, *(f"{value:,}" for value in values), f"{sum(values):,}"))
    flops, seconds = [each.flops for each in plans.values()], [each.seconds for each in plans.values()]
    all_steps.append(("PFLOP", *(f"{value / 1e15:,.3g}" for value in flops), f"{sum(flops) / 1e15:,.3g}"))
    all_steps.append(("hours", *(f"{value / 3600:,.3g}" for value in seconds), f"{sum(seconds) / 3600:,.3g}"))
    parts = [("memory of each device", *plans)]
    for part in next(iter(plans.values())).memory:
        sizes = [each.memory[part] for each in plans.values()]
        if any(sizes):
            parts.append((part, *(f"{size / GB:.2f} GB" for size in sizes)))
    parts.append(("sum", *(f"{sum(each.memory.values()) / GB:.2f} GB" for each in plans.values())))
    return f"{columns(all_steps)}\n\n{columns(parts)}"
