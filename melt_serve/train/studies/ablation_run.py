"""One run of an ablation: a variant post-trained at a size and a seed, then measured; what comes out is a record."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.config import DECODE_MODES, DecodeMode
from melt_serve.task.evaluate import heldout
from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.train.bundled_run import distil, fresh_student
from melt_serve.train.data.batch import Batch
from melt_serve.train.data.task_batches import encode
from melt_serve.train.distil import losses
from melt_serve.train.distil.build import student_of
from melt_serve.train.distil.shared_base import share_base
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import ask_teacher
from melt_serve.train.loop.trainer import Run
from melt_serve.train.results import Record
from melt_serve.train.session import Session
from melt_serve.train.stages import DecodeAwareBy
from melt_serve.train.studies.ablations import Size, Variant

MEASURED_LOOPS = 4
BATCH = 80


@dataclass(frozen=True)
class Outcome:
    """What a student answers to held-out questions at T = `loops`, served one way.

    Attributes:
        chunk_size: C that it is served with.
        kd: KL(teacher || student) in nats, of the last loop, mean over the replies' tokens given those before them.
        right: the share of replies that greedy decoding gives word for word.
        teacher_right: the teacher's share.
    """

    mode: DecodeMode
    loops: int
    chunk_size: int
    kd: float
    right: float
    teacher_right: float


def settings(variant: Variant, size: Size, seed: int) -> Record:
    """Return what makes a run the run it is: of records with the same settings one is enough."""
    usual = asdict(Variant("", ""))
    changes = {key: value for key, value in asdict(variant).items() if value != usual[key]}
    for words in ("name", "what", "paper"):
        changes.pop(words, None)
    facts = {"seed": seed, "size": asdict(replace(size, minutes=0)), **changes}
    if variant.start == "looplm":  # it is trained, by a recipe that may become another
        recipe = asdict(variant.recipe(size, seed))
        facts["recipe"] = {key: recipe[key] for key in ("gate_start", "transition", "alignment")}
    return json.loads(json.dumps(facts))  # as it will be read from the file


class AblationRunner:
    """The teacher, the tokenizer and the held-out questions that all runs share."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.teacher = AutoModelForCausalLM.from_pretrained(LOOPLM, dtype=torch.float32).eval().requires_grad_(False)
        self.asked: dict[int, tuple[list[Batch], list[Tensor]]] = {}

    def run(self, variant: Variant, size: Size, seed: int, folder: Path, session: Session) -> Record:
        """Train and measure; `folder` holds the run's states until it is done, and goes with it.

        Raises:
            Paused, TrainingError: see `run_stage`.
        """
        begun, busy = time.monotonic(), time.process_time()
        recipe = variant.recipe(size, seed)
        student = self.student(variant, size, seed)
        folder.mkdir(parents=True, exist_ok=True)
        for name, stage in (("transition", recipe.transition), ("alignment", recipe.alignment)):
            if stage.steps:
                distil(name, stage, self.teacher, student, self.tokenizer, Run(folder, session))
        outcomes = self.measure(student.eval(), size, variant.served_chunk_sizes(size))
        shutil.rmtree(folder)
        return {
            "variant": variant.name,
            "size": size.name,
            "seed": seed,
            "gate_weights": sum(weight.numel() for key, weight in student.named_parameters() if "kv_gate." in key),
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "seconds": round(time.monotonic() - begun, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "settings": settings(variant, size, seed),
        }

    def student(self, variant: Variant, size: Size, seed: int) -> Student:
        """Build the variant before its first step."""
        if variant.start == "melt":
            melt = AutoModelForCausalLM.from_pretrained(MELT, dtype=torch.float32)
            student = student_of(self.teacher, seed, melt.config, start="mean")
            student.load_state_dict(melt.state_dict())
        else:
            student = fresh_student(self.teacher, variant.recipe(size, seed), kv_gate_type=variant.gate_type)
        if variant.train_base != "full":
            share_base(student, self.teacher, variant.lora_rank)
        if variant.cheap_gate is not None:
            for layer in student.model.layers:
                attention, cheap = layer.self_attn, variant.cheap_gate
                trained = variant.start == "melt"
                attention.kv_gate = (
                    cheap.approximate(attention.kv_gate, student.config) if trained else cheap.build(student.config)
                )
        return student

    def measure(self, student: Student, size: Size, chunk_sizes: Sequence[int]) -> list[Outcome]:
        """Measure both decode modes at every chunk size, on the same held-out questions."""
        outcomes = []
        batches, wanted = self.heldout(size.questions)
        teacher_right = right_share(batches, wanted)
        for chunk_size in chunk_sizes:
            student.config.chunk_size = chunk_size
            for mode in DECODE_MODES:
                given = [answers(student, batch, mode) for batch in batches]
                kd, right = divergence(wanted, given), right_share(batches, given)
                outcomes.append(Outcome(mode, MEASURED_LOOPS, chunk_size, kd, right, teacher_right))
        return outcomes

    def heldout(self, count: int) -> tuple[list[Batch], list[Tensor]]:
        """Return so many questions in batches, and what the teacher answers to each batch; it is asked only once."""
        if count not in self.asked:
            questions = heldout(count)
            batches = [encode(questions[i : i + BATCH], self.tokenizer) for i in range(0, count, BATCH)]
            self.asked[count] = batches, [self.wanted(batch) for batch in batches]
        return self.asked[count]

    def wanted(self, batch: Batch) -> Tensor:
        """Return the teacher's last logits before every token of the replies, [tokens, V]."""
        return ask_teacher(self.teacher, batch, batch.before_reply, MEASURED_LOOPS, attention=False).logits[-1]


@torch.inference_mode()
def answers(student: Student, batch: Batch, mode: DecodeMode) -> Tensor:
    """Return the last loop's logits before every token of the replies, [tokens, V], as this decode mode makes them."""
    by: DecodeAwareBy | None = "tokens" if mode == "token" else None
    return student.run_batch(batch, batch.before_reply, MEASURED_LOOPS, decode_aware=by).logits[-1]


def divergence(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Return KL(wanted || given) in nats, mean over tokens; both are batches of [tokens, V]."""
    teacher, student = (torch.cat(list(each)) for each in (wanted, given))
    return (losses.divergence(teacher, student) / len(student)).item()


def right_share(batches: Sequence[Batch], logits: Sequence[Tensor]) -> float:
    """Return the share of replies that greedy decoding gives: every token is the likeliest after those before it."""
    right = total = 0
    for batch, given in zip(batches, logits, strict=True):
        assert batch.replies is not None
        question = batch.before_reply.nonzero()[:, 0]
        wrong = question[given.argmax(-1) != batch.replies[-1]].unique()
        total += len(batch.input_ids)
        right += len(batch.input_ids) - len(wrong)
    return right / total
