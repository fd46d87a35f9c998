"""What a step takes by arithmetic: FLOPs, and bytes on each device by part."""

import math
from statistics import mean

from melt_serve.config import LoopLMConfig, MeltConfig, gate_width, kv_bytes_per_token, weight_shapes
from melt_serve.train.distil.build import DTYPES, student_config
from melt_serve.train.distil.losses import ANSWERS_AT_ONCE
from melt_serve.train.recipe import PostTraining
from melt_serve.train.stages import Distillation


def sequence_flops(student: MeltConfig, recipe: PostTraining, stage: Distillation) -> float:
    """Count the FLOPs of a sequence in a step: teacher forward, student forward and backward, what is recomputed.

    Matmuls and attention; a multiplication and an addition are two. A matmul's backward pass is two, one for its input
    and one for its weights, where those are trained.
    """
    assert student.num_key_value_heads is not None and student.head_dim is not None
    d, length, loops = student.hidden_size, recipe.sequence_length, mean(stage.loops)
    q, kv = student.num_attention_heads * student.head_dim, student.num_key_value_heads * student.head_dim
    layer = 2 * d * (2 * q + 2 * kv + 3 * student.intermediate_size)
    attention = 2 * q * length  # half of the keys are visible
    both_rows = 2 if stage.interpolate else 1  # the MELT's and the LoopLM's
    base = layer + (both_rows - 1) * 4 * d * kv
    adapters = 2 * (recipe.lora_rank or 0) * (2 * (d + q) + both_rows * 2 * (d + kv))
    own = attention + 4 * d * gate_width(student) + adapters
    head = 2 * d * student.vocab_size
    depth = length * loops
    passes = depth * student.num_hidden_layers * chunk_passes(stage)
    teacher = depth * (student.num_hidden_layers * (layer + attention) + head)
    forward = passes * (base + own)
    of_base = 2 if recipe.train_base == "full" else 1
    backward = passes * (of_base * base + 2 * own) + of_base * depth * head
    recomputed = forward if recipe.checkpoint_chunks else 0
    return teacher + forward + depth * head + backward + recomputed


def chunk_passes(stage: Distillation) -> float:
    """Return how often a chunk runs, mean over the stage: twice where batches are decode-aware by two passes."""
    by_passes = stage.decode_aware_by == "passes"
    return 1 + (1 - stage.decode_aware_from) * stage.decode_aware_share * by_passes


def memory(
    teacher: LoopLMConfig,
    recipe: PostTraining,
    stage: Distillation,
    processes: int,
    kept: float,
) -> dict[str, int]:
    """Return the bytes on each device, by part; temporary copies are not counted.

    Args:
        kept: see `kept_for_backward`.
    """
    student, size = student_config(recipe, teacher), DTYPES[recipe.dtype].itemsize
    weights, of_teacher = trained_weights(student, teacher, recipe), count_weights(teacher)
    sharded = processes > 1 or recipe.dtype != "float32"
    parts = {
        "trained weights, float32, sharded": 4 * weights / processes,
        f"trained weights gathered, {recipe.dtype}": size * weights if sharded else 0,
        "gradients": 4 * weights * (1 + 1 / processes if sharded else 1),
        "optimizer states": 8 * weights / processes,
        "teacher": size * of_teacher,
        **step_memory(teacher, recipe, stage, kept),
    }
    return {part: round(each) for part, each in parts.items()}


def trained_weights(student: MeltConfig, teacher: LoopLMConfig, recipe: PostTraining) -> int:
    """Count the weights that are trained: all, or those of the gates and of adapters of q, k, v and o."""
    if recipe.train_base == "full":
        return count_weights(student)
    assert student.num_key_value_heads is not None and student.head_dim is not None
    q, kv = (student.head_dim * heads for heads in (student.num_attention_heads, student.num_key_value_heads))
    adapters = student.num_hidden_layers * (recipe.lora_rank or 0) * (4 * student.hidden_size + 2 * q + 2 * kv)
    return count_weights(student) - count_weights(teacher) + student.hidden_size + 1 + adapters  # the exit gate's


def count_weights(model: LoopLMConfig) -> int:
    """Count all weights of a model."""
    return sum(math.prod(shape) for _, shape in weight_shapes(model))


def step_memory(teacher: LoopLMConfig, recipe: PostTraining, stage: Distillation, kept: float) -> dict[str, float]:
    """Return the bytes that are there while a step runs, by part: `memory` without what is there between steps."""
    student, size = student_config(recipe, teacher), DTYPES[recipe.dtype].itemsize
    loops, tokens = max(stage.loops), recipe.micro_batch * recipe.sequence_length
    recomputed, trains_head = recipe.checkpoint_chunks, recipe.train_base == "full"
    rows = tokens * kv_bytes_per_token(student, size)
    layer_states = student.num_hidden_layers * student.hidden_size * tokens * size
    logits = min(ANSWERS_AT_ONCE, loops * tokens) * student.vocab_size * (3 * size + 5 * 4)
    if recomputed:
        logits = max(0.0, logits - kept)  # they are gone before the last chunk runs again
    return {
        "teacher's attention outputs": loops * layer_states if stage.alignment else 0,
        "final rows and gradients": 2 * rows if recomputed else 0,
        "phase 1's rows per loop and gradients": 2 * loops * rows if recomputed and stage.interpolate else 0,
        "embeddings, states of every loop, their gradients": (2 * loops + 1) * tokens * student.hidden_size * size,
        "kept for backward, of the last chunk" if recomputed else "kept for backward": kept,
        "logits of the loss, beyond the last chunk" if recomputed else "logits of the loss": logits,
        "gradient of the head": trains_head * student.vocab_size * student.hidden_size * (2 * size + 4),
    }
