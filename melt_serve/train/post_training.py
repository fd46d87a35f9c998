"""Post-training of a LoopLM of one's own: all stages of a recipe, then the MELT that is served."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from melt_serve.checkpoint_path import located
from melt_serve.config import MeltConfig
from melt_serve.convert import warn_about_blocks
from melt_serve.train.atomic import replacing
from melt_serve.train.data.batch import Batch, moved
from melt_serve.train.data.sequences import Sequences
from melt_serve.train.distil.build import DTYPES, fresh_student, place, plain
from melt_serve.train.distil.gate_rank import cut_gate
from melt_serve.train.distil.phase import run_phase
from melt_serve.train.distil.teacher import load_teacher
from melt_serve.train.inputs import input_files, note_inputs
from melt_serve.train.loop.distributed import process_group, rank, world_size
from melt_serve.train.loop.export import export, run_card
from melt_serve.train.loop.logs import LOG
from melt_serve.train.loop.trainer import Saving
from melt_serve.train.recipe import PostTraining
from melt_serve.train.session import Session, TrainingError

RECIPE = "recipe.json"
MAY_CHANGE = ("output", "gate_rank", "save_steps", "save_minutes", "micro_batch", "checkpoint_chunks", "compile")
"""Fields that a run may be resumed with other values of; the losses stay the same, up to rounding."""


def post_train(recipe: PostTraining, folder: Path, session: Session) -> None:
    """Run the recipe's stages, then write the MELT to its output.

    Args:
        folder: holds recipe, states and logs; what an earlier session left there is gone on with.

    Raises:
        CheckpointError: no such teacher.
        TrainingError: no free output, or `folder` holds a run of another recipe, teacher or data; see
            also `run_stage`.
        DataError: see `Sequences`.
        Paused: the session ended first.
    """
    check_output(Path(recipe.output))
    path = located(recipe.teacher)
    teacher, tokenizer = load_teacher(recipe, path)
    sequences = Sequences(recipe, tokenizer, folder)
    dtype, target = DTYPES[recipe.dtype], Path(recipe.output)
    with process_group(dtype) as device:
        check_share(recipe)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            note_recipe(recipe, folder)
            note_inputs(input_files(recipe, path), folder)
            warn_about_blocks(recipe.chunk_size)
        student = fresh_student(recipe, teacher)
        place(recipe, teacher, student, device)
        saving, first = Saving(recipe.save_steps, recipe.save_minutes), 0
        for name, stage in recipe.stages.items():
            batches = batches_of(recipe, sequences, first, device)
            run_phase(name, stage, teacher, student, batches, folder, session, saving)
            first += stage.steps * recipe.sequences
        melt = plain(student)
        if rank() == 0:
            if recipe.gate_rank is not None:
                melt = cut_gate(melt, recipe.gate_rank)
            melt.to(dtype)
            export(melt, tokenizer, run_card(melt, recipe, path, folder / LOG), target, path)


def check_share(recipe: PostTraining) -> None:
    """See that all processes have the same work.

    Raises:
        TrainingError: a step's micro-batches cannot be shared out evenly.
    """
    micro_batches = recipe.sequences // recipe.micro_batch
    if micro_batches % world_size():
        raise TrainingError(
            f"a step has {micro_batches} micro-batches of micro_batch={recipe.micro_batch} sequences, which "
            f"{world_size()} processes cannot share evenly; change batch_tokens, micro_batch or the processes"
        )


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
        known = {"train_base": "full", **json.loads(path.read_text(encoding="utf-8"))}  # the field is younger than runs
        changed = [key for key in facts if key not in MAY_CHANGE and facts[key] != known.get(key)]
        if changed:
            raise TrainingError(
                f"{folder} holds a run with another recipe ({', '.join(changed)} differ); "
                "say the same again, or use another --run folder"
            )
    with replacing(path) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def batches_of(
    recipe: PostTraining, sequences: Sequences, first: int, device: torch.device
) -> Callable[[int], Sequence[Batch]]:
    """Return what gives this process's micro-batches of a step.

    Args:
        first: the number of the stage's first sequence.
    """
    size = recipe.micro_batch

    def batches(step: int) -> list[Batch]:
        begin = first + step * recipe.sequences
        starts = range(begin, begin + recipe.sequences, size)[rank() :: world_size()]
        return [moved(sequences(range(start, start + size)), device) for start in starts]

    return batches
