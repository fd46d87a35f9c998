"""How a student is built from a recipe and a teacher, and what it is in the end."""

import os
import shutil

import torch
from huggingface_hub.errors import StrictDataclassError

from melt_serve.checkpoint_check import check_checkpoint
from melt_serve.checkpoint_config import load_config, located_looped
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.config import LoopLMConfig, MeltConfig, gate_width, shape_facts
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.distil.shared_base import merged, share_base
from melt_serve.train.distil.student import Student
from melt_serve.train.loop.distributed import full_tensors, shard
from melt_serve.train.recipe import GateStart, PostTraining
from melt_serve.train.session import TrainingError

GATE = ("kv_gate_type", "kv_gate_rank", "kv_gate_bias", "kv_gate_initial_state")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fresh_student(recipe: PostTraining, teacher: OuroForCausalLM) -> Student:
    """Build the recipe's MELT as it is before its first step.

    Raises:
        CheckpointError: the MELT to begin with is not whole.
        TrainingError: it is not of the teacher's shape; see also `student_config`.
    """
    start = recipe.gate_start if recipe.student is None else "mean"
    student = student_of(teacher, recipe.seed, student_config(recipe, teacher.config), start)
    if recipe.student is not None:
        check_checkpoint(located_looped(recipe.student))
        begun = MeltForCausalLM.from_pretrained(located_looped(recipe.student), dtype=torch.float32)
        try:
            student.load_state_dict(begun.state_dict())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise TrainingError(f"student={recipe.student} is not a MELT of the teacher's shape: {reason}") from error
    if recipe.train_base != "full":
        share_base(student, teacher, recipe.lora_rank)
    student.checkpoint_chunks = recipe.checkpoint_chunks
    return student


def student_config(recipe: PostTraining, teacher: LoopLMConfig) -> MeltConfig:
    """Return the config of the MELT that the recipe makes of a teacher.

    Raises:
        CheckpointError: the MELT to begin with is none.
        TrainingError: see `melt_config`.
    """
    if recipe.student is not None:
        begun = load_config(located_looped(recipe.student))
        if not isinstance(begun, MeltConfig):
            raise CheckpointError(f"student={recipe.student} is no MELT; name it as teacher, or a MELT made from it")
        most = recipe.max_loops or begun.most_loops
        check_loops(recipe, most, f"student={recipe.student}")
        gate = {name: getattr(begun, name) for name in GATE}
        return melt_config(
            teacher,
            chunk_size=recipe.chunk_size,
            decode_mode=recipe.decode_mode,
            max_loops=most,
            **gate,
        )
    deepest = max(teacher.total_ut_steps, *(max(stage.loops) for stage in recipe.stages.values()))
    check_loops(recipe, recipe.max_loops or deepest, "the recipe")
    return fresh_config(
        teacher,
        recipe.gate_start,
        chunk_size=recipe.chunk_size,
        decode_mode=recipe.decode_mode,
        max_loops=recipe.max_loops or deepest,
        kv_gate_type=recipe.gate_type,
        kv_gate_rank=recipe.trained_rank,
    )


def check_loops(recipe: PostTraining, most: int, whose: str) -> None:
    """See that no stage draws more loops than the MELT may run.

    Raises:
        TrainingError: one does.
    """
    for name, stage in recipe.stages.items():
        if max(stage.loops) > most:
            raise TrainingError(
                f"{name}.loops={list(stage.loops)} is more than the max_loops={most} of {whose}; name fewer"
            )


def fresh_config(config: LoopLMConfig, start: GateStart, **melt: object) -> MeltConfig:
    """Return `melt_config` with the biases that its gate, if it learns, needs to start like that.

    Raises:
        TrainingError: see `melt_config`.
    """
    made = melt_config(config, **melt)
    return melt_config(made, kv_gate_bias="loop") if start == "mean" and gate_width(made) else made


def melt_config(config: LoopLMConfig, **melt: object) -> MeltConfig:
    """Return a MELT's config with the fields of `config`, but for those that `melt` adds or replaces.

    Raises:
        TrainingError: a field has a value that it cannot have.
    """
    try:
        return MeltConfig(**{**shape_facts(config), **melt})
    except StrictDataclassError as error:
        raise TrainingError(f"the recipe makes no MELT: {error.__cause__ or error}") from error


@torch.no_grad()
def student_of(teacher: OuroForCausalLM, seed: int, config: MeltConfig, start: GateStart) -> Student:
    """Build a student of this config with the teacher's weights and a fresh gate.

    Args:
        start: `mean` is what a gate with a bias a loop is when it is fresh; a number is every layer's b_z.
    """
    torch.manual_seed(seed)
    student = Student(config).train()
    student.load_state_dict(teacher.state_dict(), strict=False)
    for layer in student.model.layers:
        if start != "mean" and layer.self_attn.kv_gate.learned:
            layer.self_attn.kv_gate.input_proj.bias.fill_(start)
    return student


def place(recipe: PostTraining, teacher: OuroForCausalLM, student: Student, device: torch.device) -> None:
    """Move both models to the device and shard the student; compile the layers of both where the recipe asks for it.

    Raises:
        TrainingError: see `compile_layers`.
    """
    dtype = DTYPES[recipe.dtype]
    shard(student.to(device), dtype)
    teacher.to(device, dtype)
    if recipe.compile:
        compile_layers(teacher)
        compile_layers(student)


def compile_layers(model: OuroForCausalLM | Student) -> None:
    """Fuse what is between the matmuls of every layer after its attention, whose shapes are those of a chunk.

    Raises:
        TrainingError: there is no compiler for `torch.compile` to use.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise TrainingError("compile=true needs a C++ compiler, and there is none: install g++, or set compile=false")
    for layer in model.model.layers:
        layer.finish = torch.compile(layer.finish)


def plain(student: Student) -> MeltForCausalLM:
    """Return the student as the reference model, adapters merged, to be evaluated and saved.

    All processes must call it.
    """
    melt = MeltForCausalLM(student.config)
    melt.load_state_dict(merged(full_tensors(student.state_dict())))
    return melt.eval()
