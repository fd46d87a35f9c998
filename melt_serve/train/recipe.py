"""Every choice of a training run, typed. Where the paper is silent the choice is ours."""

from dataclasses import dataclass, field, replace
from typing import Literal

Tokens = Literal["reply", "all"]
Loops = Literal["all", "last"]

DEPTHS = (1, 2, 3, 4, 4, 4, 6, 8)
"""Loops that the bundled MELT is post-trained at."""


@dataclass(frozen=True)
class Shape:
    """The models' shape; the student has the teacher's, and a gate."""

    hidden_size: int = 192
    intermediate_size: int = 576
    layers: int = 1
    heads: int = 6
    loops: int = 4
    max_loops: int = 8
    chunk_size: int = 32


@dataclass(frozen=True)
class Stage:
    """One optimizer's run.

    Attributes:
        learning_rate: AdamW's; for the teacher that of vectors and embeddings only.
        batch: questions a step.
        loops: each batch runs one of these, drawn at random; so the model learns to be asked at any depth.
        warmup: steps in which the learning rates rise from zero.
        decay_from: the share of the steps after which they fall linearly to zero.
        clip: the largest norm of the gradient.
        seed: of the data's order.
    """

    steps: int
    learning_rate: float
    batch: int = 24
    loops: tuple[int, ...] = (4,)
    warmup: int = 30
    decay_from: float = 0.5
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Pretraining(Stage):
    """A LoopLM from nothing: cross-entropy on the replies, mean over loops (as Ouro, arXiv 2510.25741).

    A loop is asked for as many steps of a chain as it can have made, `Batch.reply_by_loop`; the last one for all.
    Asked for the whole reply, the loops before it are taught to guess instead of to pass on what they have found,
    and more than one step in silence is hardly learnt.

    Attributes:
        aloud_until: the share of the steps in which all questions are of the kind `aloud`.
        matrix_learning_rate: Muon's, for the matrices inside the layers, which learn the task's lookups in
            fewer steps with it than with AdamW.
        embedding_std: at the start, a token's identity must not drown in what the sandwich norms, whose
            weights are 1, add to the residual stream.
    """

    aloud_until: float = 0.2
    matrix_learning_rate: float = 7e-3
    embedding_std: float = 1.0


@dataclass(frozen=True)
class Distillation(Stage):
    """Phase 1 or 2: the student learns from the frozen teacher (arXiv 2605.07721).

    Attributes:
        gate_learning_rate: AdamW's for the gate, which starts fresh.
        loss_on: the tokens whose answers are compared with the teacher's.
        kd_at: the loops whose answers are compared.
        interpolate: phase 1: rows go from the LoopLM's (alpha 0) to MELT's (alpha 1) over the steps.
        alignment: beta, the weight of the attention outputs' squared distance; 0 leaves it out.
        decode_aware_from: the share of the steps after which batches may run the reply token by token,
            as `token` mode decodes it; 1 never does.
        decode_aware_share: the share of those batches that do.
        loop_price: what a token's loop costs, in nats, mean over all tokens. Above 0, tokens leave their loops as
            the exit gate says, each at a threshold of its own drawn at random, and the gate learns which loops are
            worth their price: by their effect on the replies, also through the rows of tokens that answer nothing
            (our choice; Ouro trains its gate on a token's own loss).
        exit_share: the share of batches in which tokens leave; in the others they run all loops, so that the model
            does not forget how.
    """

    gate_learning_rate: float = 3e-3
    loss_on: Tokens = "reply"
    kd_at: Loops = "all"
    interpolate: bool = False
    alignment: float = 0.0
    decode_aware_from: float = 1.0
    decode_aware_share: float = 0.5
    loop_price: float = 0.0
    exit_share: float = 0.5


@dataclass(frozen=True)
class Recipe:
    """The bundled checkpoints, from nothing.

    Attributes:
        shallow: a LoopLM of one loop on the teacher's data: what the same weights learn without depth.
    """

    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    teacher: Pretraining = Pretraining(steps=1500, learning_rate=3e-3, loops=(4, 4, 5, 8))
    shallow: Pretraining = Pretraining(steps=1500, learning_rate=3e-3, loops=(1,))
    transition: Distillation = Distillation(
        steps=300, learning_rate=3e-4, loops=DEPTHS, interpolate=True, decay_from=1.0
    )
    alignment: Distillation = Distillation(
        steps=500, learning_rate=3e-4, loops=DEPTHS, alignment=0.1, decode_aware_from=0.0
    )
    exits: Distillation = Distillation(
        steps=600, learning_rate=3e-4, loops=(2, 3, 4, 4, 6, 8, 8), decode_aware_from=0.0, loop_price=0.02
    )

    def seeded(self, seed: int) -> "Recipe":
        """The same recipe with other weights and other data."""
        stages = {name: replace(getattr(self, name), seed=seed) for name in STAGES}
        return replace(self, seed=seed, **stages)


STAGES = ("teacher", "shallow", "transition", "alignment", "exits")
