"""Every choice of a training run, typed. Where the paper is silent the choice is ours."""

from dataclasses import dataclass, field, replace
from typing import Literal

Tokens = Literal["reply", "all"]


@dataclass(frozen=True)
class Shape:
    """The models' shape; the student has the teacher's, and a gate."""

    hidden_size: int = 192
    intermediate_size: int = 576
    layers: int = 1
    heads: int = 6
    loops: int = 4
    chunk_size: int = 32


@dataclass(frozen=True)
class Stage:
    """One optimizer's run.

    Attributes:
        learning_rate: AdamW's; for the teacher that of vectors and embeddings only.
        batch: questions a step.
        warmup: steps in which the learning rates rise from zero.
        decay_from: the share of the steps after which they fall linearly to zero.
        clip: the largest norm of the gradient.
        seed: of the data's order.
    """

    steps: int
    learning_rate: float
    batch: int = 24
    warmup: int = 30
    decay_from: float = 0.5
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Pretraining(Stage):
    """A LoopLM from nothing: cross-entropy on the replies, mean over loops (as Ouro, arXiv 2510.25741).

    Attributes:
        matrix_learning_rate: Muon's, for the matrices inside the layers, which learn the task's lookups in
            fewer steps with it than with AdamW.
        embedding_std: at the start, a token's identity must not drown in what the sandwich norms, whose
            weights are 1, add to the residual stream.
    """

    matrix_learning_rate: float = 7e-3
    embedding_std: float = 1.0


@dataclass(frozen=True)
class Distillation(Stage):
    """Phase 1 or 2: the student learns from the frozen teacher (arXiv 2605.07721).

    Attributes:
        gate_learning_rate: AdamW's for the gate, which starts fresh.
        loss_on: the tokens whose answers are compared with the teacher's.
        interpolate: phase 1: rows go from the LoopLM's (alpha 0) to MELT's (alpha 1) over the steps.
        alignment: beta, the weight of the attention outputs' squared distance; 0 leaves it out.
        decode_aware_from: the share of the steps after which batches may run the reply token by token,
            as `token` mode decodes it; 1 never does.
        decode_aware_share: the share of those batches that do.
    """

    gate_learning_rate: float = 3e-3
    loss_on: Tokens = "reply"
    interpolate: bool = False
    alignment: float = 0.0
    decode_aware_from: float = 1.0
    decode_aware_share: float = 0.5


@dataclass(frozen=True)
class Recipe:
    """The bundled checkpoints, from nothing.

    Attributes:
        shallow: a LoopLM of one loop on the teacher's data: what the same weights learn without depth.
    """

    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    teacher: Pretraining = Pretraining(steps=1500, learning_rate=3e-3)
    shallow: Pretraining = Pretraining(steps=1500, learning_rate=3e-3)
    transition: Distillation = Distillation(steps=300, learning_rate=3e-4, interpolate=True, decay_from=1.0)
    alignment: Distillation = Distillation(steps=500, learning_rate=3e-4, alignment=0.1, decode_aware_from=0.0)

    def seeded(self, seed: int) -> "Recipe":
        """The same recipe with other weights and other data."""
        stages = {name: replace(getattr(self, name), seed=seed) for name in STAGES}
        return replace(self, seed=seed, **stages)


STAGES = ("teacher", "shallow", "transition", "alignment")
