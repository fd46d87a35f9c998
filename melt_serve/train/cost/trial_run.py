"""One trial: some steps of each phase, taken as `run` takes them, and a record of what they asked of the device."""

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from melt_serve.capacity import shape_of
from melt_serve.config import LoopLMConfig
from melt_serve.device import forget_peak, matmul_rate, name_of, peak_memory
from melt_serve.modeling import OuroForCausalLM
from melt_serve.train.cost.arithmetic import sequence_flops
from melt_serve.train.cost.probe import reduced
from melt_serve.train.data.batch import IGNORED, Batch, moved
from melt_serve.train.distil.build import DTYPES, fresh_student, place, student_config
from melt_serve.train.distil.phase import loops_of, run_phase
from melt_serve.train.distil.student import Student
from melt_serve.train.loop.distributed import process_group, world_size
from melt_serve.train.loop.logs import LOG, read_log
from melt_serve.train.loop.trainer import Run, Saving
from melt_serve.train.recipe import PostTraining
from melt_serve.train.recipe_files import RecipeError, find_recipe, load_recipe, override, read_table
from melt_serve.train.results import Record, append_record, fingerprint, read_records
from melt_serve.train.session import Paused, Session, TrainingError

MICRO_BATCHES = 2
CHUNKS = 2
SESSIONS = "sessions.jsonl"


@dataclass(frozen=True)
class Trial:
    """A recipe as it is tried.

    Attributes:
        recipe: with as many steps, sequences and tokens as are tried.
        teacher: its shape, reduced if `scale` is not 1.
        run_tokens: a step's of the recipe as it would be run.
    """

    recipe: PostTraining
    teacher: LoopLMConfig
    scale: int
    run_tokens: int

    @property
    def size(self) -> str:
        """Whether the size is the true one, in words."""
        teacher = self.teacher
        how = "true" if self.scale == 1 else f"reduced by {self.scale}"
        shape = f"width {teacher.hidden_size:,}, {teacher.num_hidden_layers} layers, {teacher.vocab_size:,} words"
        return f"{how} ({shape}, {self.recipe.sequence_length:,} tokens a sequence)"

    def settings(self, device: str) -> Record:
        """Return what makes a trial the one it is."""
        facts = {"device": device, "teacher": self.teacher.to_dict(), "recipe": asdict(self.recipe)}
        return json.loads(json.dumps(facts))  # as it will be read from the file


def prepare(name: str, overrides: Sequence[str], scale: int, steps: int) -> Trial:
    """Load the recipe of that name or file as it is tried.

    Raises:
        RecipeError: there is none such, or it is not of a post-training.
        PlanError: it names a teacher whose shape cannot be known.
    """
    said: dict[str, Any] = {}
    for word in overrides:
        override(said, word)
    written = read_table(find_recipe(name), overrides)
    if written.get("kind") == "bundled":
        raise RecipeError(f"{name} is of the bundled kind; only a post-training can be tried")
    tokens, length, chunk, micro_batch = (
        written.get(field, getattr(PostTraining, field))
        for field in ("batch_tokens", "sequence_length", "chunk_size", "micro_batch")
    )
    words = list(overrides)
    if all(isinstance(value, int) for value in (length, chunk, micro_batch)):  # else `load_recipe` says what is wrong
        if scale > 1 and "sequence_length" not in said:
            length = max(2, CHUNKS * chunk)
            words.append(f"sequence_length={length}")
        if "batch_tokens" not in said:
            words.append(f"batch_tokens={MICRO_BATCHES * micro_batch * length}")
    recipe = load_recipe(name, words, {"teacher": "ouro-1.4b", "data": {"files": "-"}, "output": "-"})
    assert isinstance(recipe, PostTraining)
    teacher = shape_of(recipe.teacher)
    # Tokens that run one by one are another arithmetic than the one that is counted.
    tried = {key: replace(stage, steps=steps, decode_aware_from=1.0) for key, stage in recipe.tables.items()}
    further = {key: tried.pop(key) for key in recipe.further}
    recipe = replace(recipe, further=further, **tried)  # type: ignore[arg-type]
    if scale > 1:
        teacher, _ = reduced(teacher, recipe, scale)
    return Trial(recipe, teacher, scale, tokens)


def measure(tried: Trial, path: Path, session: Session) -> Iterator[Record]:
    """Yield every phase's record, in order; one that is not in the file yet is measured, and appended.

    Raises:
        Paused: the session ended first.
        TrainingError: torchrun started this, or no step of a phase could be measured; see also `run_stage`.
        StudyError: a line of the file is broken.
    """
    recipe = tried.recipe
    with process_group(DTYPES[recipe.dtype]) as device:
        if world_size() > 1:
            raise TrainingError("a trial is one process on one device; start it without torchrun")
        settings = tried.settings(name_of(device))
        records = {record["phase"]: record for record in read_records(path) if record["settings"] == settings}
        folder = path.parent / fingerprint(settings)
        if records.keys() < recipe.stages.keys():
            folder.mkdir(parents=True, exist_ok=True)
            teacher, student = random_models(tried, device)
        for name in recipe.stages:
            if name not in records:
                take_steps(name, tried, teacher, student, folder, device, session)
                records[name] = record_of(name, tried, folder, settings)
                append_record(path, records[name])
                for state in folder.glob(f"{name}.state.pt*"):
                    state.unlink()
            yield records[name]
        if folder.exists():
            shutil.rmtree(folder)


def random_models(tried: Trial, device: torch.device) -> tuple[OuroForCausalLM, Student]:
    """Build teacher and student as `run` does, but with random weights, made where they will be."""
    torch.manual_seed(tried.recipe.seed)
    with device:
        teacher = OuroForCausalLM(tried.teacher).eval().requires_grad_(False)
        student = fresh_student(tried.recipe, teacher)
    place(tried.recipe, teacher, student, device)
    return teacher, student


def take_steps(
    name: str,
    tried: Trial,
    teacher: OuroForCausalLM,
    student: Student,
    folder: Path,
    device: torch.device,
    session: Session,
) -> None:
    """Take one phase's steps, or what of them fits the session; note in `folder` what only this session knows.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    recipe = tried.recipe
    steps: list[int] = []

    def batches(step: int) -> list[Batch]:
        steps.append(step)
        starts = range(step * recipe.sequences, (step + 1) * recipe.sequences, recipe.micro_batch)
        return [moved(random_batch(recipe, tried.teacher.vocab_size, start), device) for start in starts]

    pause = None
    forget_peak(device)
    run = Run(folder, session, Saving(minutes=math.inf, at_end=False))  # at the true size a state is 20 GB
    try:
        run_phase(name, recipe.stages[name], teacher, student, batches, run)
    except Paused as paused:
        pause = paused
    if steps:
        entry = {"phase": name, "first_step": steps[0], "peak_memory": peak_memory(device)}
        entry["matmul_rate"] = matmul_rate(device, DTYPES[recipe.dtype])
        with (folder / SESSIONS).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    if pause:
        raise pause


def random_batch(recipe: PostTraining, words: int, number: int) -> Batch:
    """Draw sequences from this number on: a document each, all of it learnt."""
    generator = torch.Generator().manual_seed(random.Random(f"trial {recipe.seed} {number}").getrandbits(63))
    ids = torch.randint(words, (recipe.micro_batch, recipe.sequence_length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    starts = torch.zeros_like(ids) if recipe.data.pack else None
    return Batch(ids, torch.ones_like(ids), labels, document_starts=starts)


def record_of(name: str, tried: Trial, folder: Path, settings: Record) -> Record:
    """Sum up a phase's steps of all sessions.

    Raises:
        TrainingError: all of them were the first of a session.
    """
    recipe, stage = tried.recipe, tried.recipe.stages[name]
    sessions = [entry for entry in read_log(folder / SESSIONS) if entry["phase"] == name]
    warm_ups = {entry["first_step"] for entry in sessions}
    entries = [entry for entry in read_log(folder / LOG) if entry["stage"] == name]
    counted = [entry for entry in entries if entry["step"] not in warm_ups]
    if not counted:
        raise TrainingError(
            f"{name}: each of its {len(entries)} steps was the first of a session and warmed up, so none could be "
            "measured; give more --minutes and --steps"
        )

    def flops_a_token(checkpointed: bool) -> float:
        arithmetic, student = replace(recipe, checkpoint_chunks=checkpointed), student_config(recipe, tried.teacher)
        loops = tuple(loops_of(stage, entry["step"]) for entry in counted)
        return sequence_flops(student, arithmetic, replace(stage, loops=loops)) / recipe.sequence_length

    seconds = [entry["seconds"] for entry in counted]
    tokens_per_second = recipe.batch_tokens / median(seconds)
    multiplied = median(entry["matmul_rate"] for entry in sessions)
    flops, with_repeats = flops_a_token(False), flops_a_token(recipe.checkpoint_chunks)
    return {
        "phase": name,
        "device": settings["device"],
        "size": tried.size,
        "dtype": recipe.dtype,
        "steps": len(entries),
        "sessions": len(sessions),
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "slowest": recipe.batch_tokens / max(seconds),
        "fastest": recipe.batch_tokens / min(seconds),
        "peak_memory": max(entry["peak_memory"] for entry in sessions),
        "flops_per_token": flops,
        "flops_per_token_with_repeats": with_repeats,
        "flops_per_second": tokens_per_second * flops,
        "matmul_rate": multiplied,
        "share": tokens_per_second * flops / multiplied,
        "share_with_repeats": tokens_per_second * with_repeats / multiplied,
        "torch": torch.__version__,
        "settings": settings,
    }
