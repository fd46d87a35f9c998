"""A LoopLM of one's own into a MELT that is served: `python -m melt_serve.train run`."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from melt_serve.config import LoopLMConfig, MeltConfig
from melt_serve.convert import warn_about_blocks
from melt_serve.modeling import OuroForCausalLM
from melt_serve.train.data import Batch
from melt_serve.train.distil import melt_config, plain, run_phase, start_gate, student_of
from melt_serve.train.export import export, run_card
from melt_serve.train.gate_rank import cut_gate
from melt_serve.train.logs import LOG
from melt_serve.train.recipe import PostTraining
from melt_serve.train.scale import processes, rank, shard, world
from melt_serve.train.sources import Sequences
from melt_serve.train.student import Student
from melt_serve.train.trainer import Saving, Sitting, TrainingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECIPE = "recipe.json"
MAY_CHANGE = ("output", "gate_rank", "save_steps", "save_minutes", "micro_batch", "checkpoint_chunks", "compile")
"""Fields that a run may be resumed with other values of; the losses stay the same, up to rounding."""


def post_train(recipe: PostTraining, folder: Path, sitting: Sitting) -> None:
    """Run the recipe's stages, then write the MELT to its output.

    Args:
        folder: holds recipe, states and logs; what an earlier sitting left there is gone on with.

    Raises:
        TrainingError: no such teacher, no free output, or `folder` holds another recipe's run; see also `run_stage`.
        DataError: see `Sequences`.
        Paused: the sitting ended first.
    """
    check_output(Path(recipe.output))
    teacher, tokenizer = load_teacher(recipe)
    sequences = Sequences(recipe, tokenizer, folder)
    dtype, target = DTYPES[recipe.dtype], Path(recipe.output)
    with processes(dtype) as device:
        check_share(recipe)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            note_recipe(recipe, folder)
            warn_about_blocks(recipe.chunk_size)
        student = fresh_student(recipe, teacher).to(device)
        shard(student, dtype)
        teacher.to(device, dtype)
        if recipe.compile:
            compile_layers(teacher)
            compile_layers(student)
        saving, first = Saving(recipe.save_steps, recipe.save_minutes), 0
        for name, stage in recipe.stages.items():
            batches = batches_of(recipe, sequences, first, device)
            run_phase(name, stage, teacher, student, batches, folder, sitting, saving)
            first += stage.steps * recipe.sequences
        melt = plain(student)
        if rank() == 0:
            if recipe.gate_rank is not None:
                melt = cut_gate(melt, recipe.gate_rank)
            melt.to(dtype)
            export(melt, tokenizer, run_card(melt, recipe, folder / LOG), target, Path(recipe.teacher))


def check_share(recipe: PostTraining) -> None:
    """See that all processes have the same work.

    Raises:
        TrainingError: a step's micro-batches cannot be shared out evenly.
    """
    micro_batches = recipe.sequences // recipe.micro_batch
    if micro_batches % world():
        raise TrainingError(
            f"a step has {micro_batches} micro-batches of micro_batch={recipe.micro_batch} sequences, which {world()} "
            "processes cannot share evenly; change batch_tokens, micro_batch or the processes"
        )


def load_teacher(recipe: PostTraining) -> tuple[OuroForCausalLM, PreTrainedTokenizerFast]:
    """The frozen LoopLM in float32, and its tokenizer.

    Raises:
        TrainingError: the folder holds no whole LoopLM, or one that the recipe does not fit.
    """
    path = Path(recipe.teacher)
    config = teacher_config(recipe)
    if recipe.gate_rank is not None and recipe.gate_rank > config.hidden_size:
        raise TrainingError(f"gate_rank={recipe.gate_rank} is more than the teacher's hidden_size={config.hidden_size}")
    if recipe.sequence_length > config.max_position_embeddings:
        raise TrainingError(
            f"sequence_length={recipe.sequence_length} is more than the teacher's "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    teacher, report = OuroForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise TrainingError(f"teacher={path} lacks the tensor {missing[0]} and {len(missing) - 1} more")
    return teacher.eval().requires_grad_(False), AutoTokenizer.from_pretrained(path)


def teacher_config(recipe: PostTraining) -> LoopLMConfig:
    """The teacher's shape.

    Raises:
        TrainingError: the folder holds no LoopLM.
    """
    path = Path(recipe.teacher)
    if not (path / "config.json").is_file():
        raise TrainingError(f"teacher={path} is not the folder of a checkpoint: it holds no config.json")
    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, LoopLMConfig) or isinstance(config, MeltConfig):
        raise TrainingError(f"teacher={path} is a {config.model_type!r} model; a teacher is a LoopLM ('ouro')")
    return config


def check_output(output: Path) -> None:
    """Refuse a folder that holds anything but a MELT, for it will be replaced.

    Raises:
        TrainingError: it does, or is no folder.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        melt = json.loads((output / "config.json").read_text(encoding="utf-8"))["model_type"] == MeltConfig.model_type
    except (OSError, ValueError, KeyError):
        melt = False
    if not melt:
        raise TrainingError(f"output={output} holds something that is not a MELT checkpoint; name a new folder")


def note_recipe(recipe: PostTraining, folder: Path) -> None:
    """Write down what the run is, or see that it is the one that is there.

    Raises:
        TrainingError: it is another one.
    """
    path, facts = folder / RECIPE, json.loads(json.dumps(asdict(recipe)))
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in facts if key not in MAY_CHANGE and facts[key] != known.get(key)]
        if changed:
            raise TrainingError(
                f"{folder} holds a run with another recipe ({', '.join(changed)} differ); "
                "say the same again, or use another --run folder"
            )
    part = path.with_name(f".{RECIPE}.partial")
    part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


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


def batches_of(
    recipe: PostTraining, sequences: Sequences, first: int, device: torch.device
) -> Callable[[int], Sequence[Batch]]:
    """This process's micro-batches of a step, of a stage whose first sequence has the number `first`."""
    size = recipe.micro_batch

    def batches(step: int) -> list[Batch]:
        begin = first + step * recipe.sequences
        starts = range(begin, begin + recipe.sequences, size)[rank() :: world()]
        return [moved(sequences(range(start, start + size)), device) for start in starts]

    return batches


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on that device."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: each.to(device) for name, each in values.items() if isinstance(each, Tensor)})
