"""One run of the study of lengths: a model learns a word problem from nothing and is asked about longer words."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from melt_serve.config import LoopLMConfig, MeltConfig, weight_shapes
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.loop.logs import LOG, read_log
from melt_serve.train.loop.trainer import Losses, Run, run_stage
from melt_serve.train.results import Record
from melt_serve.train.session import Session
from melt_serve.train.stages import Count, Rate, Share, Stage
from melt_serve.train.studies.word_problems import PROBLEMS, Word, WordProblem, words

STAGE = "words"
LONGER = 4
"""Words are measured up to this many times the length of training."""
MEASURED_WORDS = 500
MEASURED_BATCH = 250
WHOLE_WORD = 2048
"""A chunk that no word fills."""
EMBEDDING_STD = 1.0
"""As `Pretraining.embedding_std`."""


@dataclass(frozen=True)
class Curriculum(Stage):
    """How a model learns: cross-entropy of the last loop's answer after every letter.

    Attributes:
        matrix_learning_rate: Muon's, for the matrices inside the layers, gates included; as in `Pretraining`.
        first_length: of the words in the first step.
        length: of the words from `grown_at` on; in between they grow letter by letter.
        grown_at: a share of the steps.
    """

    matrix_learning_rate: Rate = 7e-3
    first_length: Count = 4
    length: Count = 16
    grown_at: Share = 0.5

    def length_at(self, step: int) -> int:
        """Return the letters of every word in this step's batch."""
        grown = min(1.0, step / max(1.0, self.grown_at * self.steps))
        return round(self.first_length + (self.length - self.first_length) * grown)


CURRICULUM = Curriculum(steps=400, learning_rate=3e-3, batch=64)


@dataclass(frozen=True)
class ModelUnderTest:
    """A model that the study of lengths compares.

    Attributes:
        what: in words.
        layers: N. loops: T.
        chunk_size: C of a MELT; None for a LoopLM.
        start: words are given with one more letter before the first, of its own kind. Without it a transformer cannot
            tell a word of one letter from that letter twice: what it attends to is alike.
        patience: it takes this many times the curriculum's steps.
    """

    name: str
    what: str
    layers: int = 1
    loops: int = 4
    chunk_size: int | None = None
    start: bool = False
    patience: int = 1

    def config(self, vocabulary: int) -> LoopLMConfig:
        """Return the model's config."""
        shape = {
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "total_ut_steps": self.loops,
            "initializer_range": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        }
        return LoopLMConfig(**shape) if self.chunk_size is None else MeltConfig(**shape, chunk_size=self.chunk_size)

    def model(self, vocabulary: int, seed: int) -> OuroForCausalLM | MeltForCausalLM:
        """Build the model before its first step."""
        torch.manual_seed(seed)
        config = self.config(vocabulary)
        model = MeltForCausalLM(config) if isinstance(config, MeltConfig) else OuroForCausalLM(config)
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(std=EMBEDDING_STD)
        return model.train()

    def multiply_adds(self, vocabulary: int) -> int:
        """Count those of the matrices inside the layers, for one letter; attention's scores are left out."""
        shapes = dict(weight_shapes(self.config(vocabulary)))
        matrices = {key: out * width for key, (out, *rest) in shapes.items() for width in rest if ".layers." in key}
        gates = sum(count for key, count in matrices.items() if "kv_gate" in key)
        return self.loops * sum(matrices.values()) - gates  # the first loop has no gate

    def layers_in_sequence(self, length: int) -> int:
        """Count the layer applications that must wait for each other until the last letter of a word is answered."""
        chunks = 1 if self.chunk_size is None else -(-length // self.chunk_size)
        return self.layers * self.loops * chunks


PLAIN = ModelUnderTest("plain", "a transformer of T layers, each with weights of its own", layers=4, loops=1)
LOOPLM = ModelUnderTest("looplm", "LoopLM, one layer")
MODELS_UNDER_TEST: dict[str, ModelUnderTest] = {
    under_test.name: under_test
    for under_test in (
        PLAIN,
        LOOPLM,
        ModelUnderTest("melt-whole", "MELT, C = the whole word", chunk_size=WHOLE_WORD),
        *(ModelUnderTest(f"melt-{size}", f"MELT, C = {size}", chunk_size=size) for size in (8, 4, 1)),
        replace(PLAIN, name="plain-start", what="`plain`, with a start letter", start=True),
        replace(LOOPLM, name="looplm-start", what="`looplm`, with a start letter", start=True),
        replace(PLAIN, name="plain-4x", what="`plain`, four times the steps", patience=4),
        replace(LOOPLM, name="looplm-4x", what="`looplm`, four times the steps", patience=4),
    )
}


def settings(under_test: ModelUnderTest, task: str, curriculum: Curriculum, seed: int) -> Record:
    """Return what makes a run the run it is: of records with the same settings one is enough."""
    model = {key: value for key, value in asdict(under_test).items() if key not in ("name", "what")}
    problem = {key: value for key, value in asdict(PROBLEMS[task]).items() if key != "what"}
    facts = {"problem": problem, "seed": seed, "model": model, "course": asdict(curriculum)}
    asked = {"words": MEASURED_WORDS, "longer": LONGER}
    return json.loads(json.dumps({**facts, **asked}))  # as it will be read from the file


def run(
    under_test: ModelUnderTest, task: str, curriculum: Curriculum, seed: int, folder: Path, session: Session
) -> Record:
    """Train and measure; `folder` holds the run's states until it is done, and goes with it.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    problem = PROBLEMS[task]
    vocabulary = start_letter(problem) + under_test.start
    model = under_test.model(vocabulary, seed)
    own = replace(curriculum, steps=under_test.patience * curriculum.steps, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    learn(model, problem, own, folder, session)
    log = read_log(folder / LOG)
    right = measure(model, problem, LONGER * curriculum.length)
    shutil.rmtree(folder)
    return {
        "task": task,
        "model": under_test.name,
        "seed": seed,
        "steps": own.steps,
        "letters": own.batch * sum(map(own.length_at, range(own.steps))),
        "weights": sum(weight.numel() for weight in model.model.layers.parameters()),
        "multiply_adds": under_test.multiply_adds(vocabulary),
        "loss": log[-1]["loss"],
        "right": right,
        "seconds": round(sum(entry["seconds"] for entry in log), 1),
        "cpu_seconds": round(sum(entry["cpu_seconds"] for entry in log), 3),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": settings(under_test, task, curriculum, seed),
    }


def learn(
    model: OuroForCausalLM | MeltForCausalLM,
    problem: WordProblem,
    curriculum: Curriculum,
    folder: Path,
    session: Session,
) -> None:
    """Follow the curriculum; the log has the CPU seconds of every step, which a busy machine does not stretch.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    clock = time.process_time()

    def losses(step: int) -> Losses:
        nonlocal clock
        before, clock = clock, time.process_time()
        batch = islice(
            words(problem, "train", f"{curriculum.seed} {step}", curriculum.length_at(step)), curriculum.batch
        )
        letters, answers = tensors(batch)
        loss = F.cross_entropy(ask(model, problem, letters).flatten(0, 1), answers.flatten())
        return {"loss": loss, "cpu_seconds": torch.tensor(clock - before)}

    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    optimizers: list[Optimizer] = [
        Muon(matrices, lr=curriculum.matrix_learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=curriculum.learning_rate, betas=(0.9, 0.98), weight_decay=curriculum.weight_decay),
    ]
    run_stage(STAGE, curriculum, model, optimizers, losses, Run(folder, session))


@torch.inference_mode()
def measure(model: OuroForCausalLM | MeltForCausalLM, problem: WordProblem, length: int) -> list[float]:
    """Return the share of right answers after each letter of the same held-out words."""
    model.eval()
    asked = words(problem, "heldout", "measured", length)
    right = torch.zeros(length)
    for _ in range(MEASURED_WORDS // MEASURED_BATCH):
        letters, answers = tensors(islice(asked, MEASURED_BATCH))
        right += (ask(model, problem, letters).argmax(-1) == answers).sum(0)
    return (right / MEASURED_WORDS).tolist()


def ask(model: OuroForCausalLM | MeltForCausalLM, problem: WordProblem, letters: Tensor) -> Tensor:
    """Return the logits after each letter, [words, length, V], with a start letter where the model has one."""
    start = start_letter(problem)
    given = F.pad(letters, (1, 0), value=start) if model.config.vocab_size > start else letters
    return model(given).logits[:, -letters.shape[1] :]


def start_letter(problem: WordProblem) -> int:
    """Return the number of the start letter, which comes after all letters and answers."""
    return max(problem.letters, problem.answers)


def tensors(batch: Iterator[Word]) -> tuple[Tensor, Tensor]:
    """Gather letters and answers of words, [words, length] each."""
    drawn = list(batch)
    return torch.tensor([word.letters for word in drawn]), torch.tensor([word.answers for word in drawn])
