"""Post-training of a LoopLM of one's own: all stages of a recipe, then the MELT that is served."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from melt_serve.checkpoint_config import located_looped
from melt_serve.config import MeltConfig
from melt_serve.convert import warn_about_blocks
from melt_serve.modeling import MeltForCausalLM
from melt_serve.train.checks import check_data, check_disk
from melt_serve.train.cost.arithmetic import sequence_flops
from melt_serve.train.data.batch import Batch, moved
from melt_serve.train.data.datasets import Corpus
from melt_serve.train.data.packing import Batches, collate
from melt_serve.train.data.records import DataError
from melt_serve.train.data.sequences import Sequences, as_chats, packing_of
from melt_serve.train.distil.build import DTYPES, fresh_student, place, plain, student_config
from melt_serve.train.distil.evaluate import Heldout
from melt_serve.train.distil.gate_rank import cut_gate
from melt_serve.train.distil.phase import run_phase
from melt_serve.train.distil.teacher import load_teacher
from melt_serve.train.inputs import data_files, note_inputs, teacher_files
from melt_serve.train.loop.distributed import ending_together, load_model, process_group, rank, world_size
from melt_serve.train.loop.export import export, run_card
from melt_serve.train.loop.loggers import Show, logger_of
from melt_serve.train.loop.logs import LOG, read_log
from melt_serve.train.loop.states import read_state
from melt_serve.train.loop.trainer import Run, Saving, Watch, unwatched
from melt_serve.train.recipe import PostTraining
from melt_serve.train.run_folder import RECIPE, check_recipe, facts_of, forget_unsaved, note_recipe, stage_reached
from melt_serve.train.session import Session, TrainingError
from melt_serve.train.stages import Distillation


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
    for name in recipe.report_to:
        logger_of(name)
    path = located_looped(recipe.teacher)
    teacher, tokenizer = load_teacher(recipe, path)
    config = student_config(recipe, teacher.config)
    with process_group(DTYPES[recipe.dtype]) as device, ExitStack() as stack:
        check_share(recipe)
        begins = partial(begun, recipe, config, path, tokenizer, folder)
        written = ending_together(begins if rank() == 0 else lambda: None)
        sequences = written or Sequences(recipe, tokenizer, folder)  # the other processes read what the first wrote
        stack.enter_context(closing(sequences))
        student = fresh_student(recipe, teacher)
        place(recipe, teacher, student, device)
        saving = Saving(
            recipe.save_steps,
            recipe.save_minutes,
            keep_last=recipe.keep_last,
            keep_every=recipe.keep_every,
            most_skipped=recipe.most_skipped,
        )
        run = Run(folder, session, saving, recipe.report_to)
        heldout = heldout_of(recipe, config.max_position_embeddings, tokenizer, device)
        goes_on = stage_reached(recipe, folder)

        def flops(stage: Distillation) -> float:
            return sequence_flops(config, recipe, stage) * recipe.sequences / world_size()

        first = 0
        for name, stage in recipe.stages.items():
            batches = batches_of(recipe, sequences, first, device)
            watch: Watch = unwatched
            if heldout is not None:
                watch = heldout.watch(name, first == 0, stage.steps, teacher, student, folder)
            if name == goes_on and rank() == 0:
                watch = noted_first(watch, recipe, folder)
            run_phase(name, stage, teacher, student, batches, run, flops, watch)
            first += stage.steps * recipe.sequences
        melt = plain(student)
        if rank() == 0:
            write_melt(melt, recipe, tokenizer, path, read_log(folder / LOG))


def begun(
    recipe: PostTraining, config: MeltConfig, teacher: Path, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Sequences:
    """Begin a run, or go on with the one in its folder: check and note what it is made from; return its sequences.

    Args:
        config: the student's.
        teacher: its folder.

    Raises:
        CheckpointError, DataError, TrainingError: see `post_train`.
    """
    forget_unsaved(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sequences = Sequences(recipe, tokenizer, folder)
    if not (folder / RECIPE).exists():
        check_data(recipe, sequences.corpus, tokenizer)
    check_disk(recipe, config, folder)
    check_recipe(facts_of(recipe), folder)
    models = teacher_files(recipe.teacher, teacher)
    if recipe.student is not None:
        models |= teacher_files(recipe.student, located_looped(recipe.student))
    note_inputs(models, data_files(recipe), folder, sequences.accept_changes)
    warn_about_blocks(recipe.chunk_size)
    return sequences


def noted_first(watch: Watch, recipe: PostTraining, folder: Path) -> Watch:
    """Return a watch that first writes the recipe down: by then its stage's state is loaded, so nothing is refused."""
    noted = False

    def watched(done: int, show: Show) -> None:
        nonlocal noted
        if not noted:
            note_recipe(facts_of(recipe), folder)
            noted = True
        watch(done, show)

    return watched


def export_state(recipe: PostTraining, state_file: Path, folder: Path) -> str:
    """Write the MELT of a saved state to the recipe's output; say which steps it has.

    Raises:
        CheckpointError: the teacher is not whole.
        TrainingError: no free output, or the state is damaged, or another run's.
    """
    check_output(Path(recipe.output))
    path = located_looped(recipe.teacher)
    teacher, tokenizer = load_teacher(recipe, path)
    student = fresh_student(recipe, teacher)
    state = read_state(state_file)
    try:
        load_model(student, state["model"])
    except (LookupError, RuntimeError) as error:
        raise TrainingError(f"{state_file} is not a state of the run in {folder}: its weights are others") from error
    stage = re.sub(r"(-\d{6,})?\.state\.pt(\.before)?$", "", state_file.name)
    if stage not in recipe.names:
        raise TrainingError(f"{state_file} is not named after a stage of the run: it has {', '.join(recipe.names)}")
    says = f"after {state['step']:,} steps of {stage}"
    before = recipe.names[: recipe.names.index(stage)]
    log = [
        entry
        for entry in read_log(folder / LOG)
        if entry["stage"] in before or (entry["stage"] == stage and entry["step"] < state["step"])
    ]
    write_melt(plain(student), recipe, tokenizer, path, log, f"It is the run {says}.")
    return says


def write_melt(
    melt: MeltForCausalLM,
    recipe: PostTraining,
    tokenizer: PreTrainedTokenizerFast,
    teacher: Path,
    log: list[dict],
    said: str = "",
) -> None:
    """Write a run's MELT to the recipe's output, its gate cut and its weights rounded as the recipe says.

    Args:
        teacher: its folder.
        log: the run's steps, as far as it is written.
        said: what the card says besides.

    Raises:
        OSError: the disk is full, or fails.
    """
    if recipe.gate_rank is not None:
        melt = cut_gate(melt, recipe.gate_rank)
    melt.to(DTYPES[recipe.dtype])
    export(melt, tokenizer, run_card(melt, recipe, teacher, log, said), Path(recipe.output), teacher)


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


def heldout_of(
    recipe: PostTraining, positions: int, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> Heldout | None:
    """Return the documents that a run is measured on, each alone; None where the recipe names none.

    Args:
        positions: that the models have; a document has no more tokens.

    Raises:
        DataError: there is nothing to learn in them.
    """
    asked = recipe.evaluation
    if asked is None:
        return None
    packing = replace(
        packing_of(recipe),
        length=min(asked.length, positions),
        window=asked.documents,
        streaming=True,
        alone=True,
        broken="skip",
        weights=None,
        too_long="cut",
    )
    stream, size = Batches(Corpus(asked.files), tokenizer, packing), recipe.micro_batch
    stream.next_window()
    packs = stream.packs[: asked.documents]
    if not packs:
        raise DataError(f"evaluation.files: nothing to learn at the beginning of {', '.join(asked.files)}")
    batches = [moved(as_chats(collate(packs[i : i + size], packing)), device) for i in range(0, len(packs), size)]
    return Heldout(batches, tokenizer, asked)


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
