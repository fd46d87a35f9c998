"""How a student is built from a teacher, and what it is in the end."""

import os
import shutil

import torch

from melt_serve.config import LoopLMConfig, MeltConfig
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.distil.student import Student
from melt_serve.train.loop.distributed import full_tensors
from melt_serve.train.recipe import PostTraining
from melt_serve.train.session import TrainingError


def student_of(teacher: OuroForCausalLM, seed: int, config: MeltConfig) -> Student:
    """The teacher's weights with a fresh gate, as `melt-serve convert` makes it."""
    torch.manual_seed(seed)
    student = Student(config).train()
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


@torch.no_grad()
def start_gate(student: Student, bias: float) -> None:
    """Set b_z in all layers, where the gate learns one."""
    for layer in student.model.layers:
        if layer.self_attn.kv_gate.learned:
            layer.self_attn.kv_gate.input_proj.bias.fill_(bias)


def melt_config(teacher: LoopLMConfig, **melt: object) -> MeltConfig:
    """The config of a MELT made from that LoopLM; `melt` are the fields it has more, or otherwise."""
    facts = {key: value for key, value in teacher.to_dict().items() if key not in ("model_type", "architectures")}
    return MeltConfig(**{**facts, **melt})


def plain(student: Student) -> MeltForCausalLM:
    """The student as the reference model, to be evaluated and saved. All processes must call it."""
    melt = MeltForCausalLM(student.config)
    melt.load_state_dict(full_tensors(student.state_dict()))
    return melt.eval()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def student_config(recipe: PostTraining, teacher: LoopLMConfig) -> MeltConfig:
    """The shape and manners of the MELT that the recipe makes of a teacher."""
    deepest = max(teacher.total_ut_steps, *(max(stage.loops) for stage in recipe.stages.values()))
    return melt_config(
        teacher,
        chunk_size=recipe.chunk_size,
        decode_mode=recipe.decode_mode,
        kv_gate_type=recipe.gate_type,
        max_loops=recipe.max_loops or deepest,
    )


def fresh_student(recipe: PostTraining, teacher: OuroForCausalLM) -> Student:
    """The MELT before its first step."""
    student = student_of(teacher, recipe.seed, student_config(recipe, teacher.config))
    start_gate(student, recipe.gate_bias)
    student.checkpoint_chunks = recipe.checkpoint_chunks
    return student


def compile_layers(model: OuroForCausalLM | Student) -> None:
    """Fuse what is between the matmuls of every layer after its attention, whose shapes are those of a chunk.

    Raises:
        TrainingError: there is no compiler for `torch.compile` to use.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise TrainingError("compile=true needs a C++ compiler, and there is none: install g++, or set compile=false")
    for layer in model.model.layers:
        layer.finish = torch.compile(layer.finish)
