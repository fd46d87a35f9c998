"""The stages of a training run, typed: what each learns, at which rates. `recipe.py` says which a run has."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

Tokens = Literal["reply", "all"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Depths = Annotated[tuple[Count, ...], Field(min_length=1)]
FORBID: ConfigDict = {"extra": "forbid"}
Loops = Literal["all", "last"]
Distance = Literal["relative", "sum", "mean"]
DecodeAwareBy = Literal["tokens", "passes"]


@dataclass(frozen=True)
class Stage:
    """The settings of one stage of training.

    Attributes:
        learning_rate: AdamW's; for the teacher that of vectors and embeddings only.
        batch: questions, or sequences, a step.
        loops: each batch runs one of these, drawn at random; so the model learns to be asked at any depth.
        warmup: steps in which the learning rates rise from zero.
        decay_from: the share of the steps after which they fall linearly to zero.
        clip: the largest norm of the gradient.
        seed: of the data's order.
    """

    __pydantic_config__: ClassVar = FORBID

    steps: Count
    learning_rate: Rate
    batch: Count = 24
    loops: Depths = (4,)
    warmup: Count = 30
    decay_from: Share = 0.5
    weight_decay: Rate = 0.01
    clip: Rate = 1.0
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

    aloud_until: Share = 0.2
    matrix_learning_rate: Rate = 7e-3
    embedding_std: Rate = 1.0


@dataclass(frozen=True)
class Distillation(Stage):
    """Phase 1 or 2: the student learns from the frozen teacher (arXiv 2605.07721).

    Attributes:
        gate_learning_rate: AdamW's for the gate, which starts fresh.
        loss_on: the tokens whose answers are compared with the teacher's.
        kd_at: the loops whose answers are compared.
        interpolate: phase 1: rows go from the LoopLM's (alpha 0) to MELT's (alpha 1) over the steps.
        alignment: beta, the weight of the attention outputs' squared distance; 0 leaves it out.
        distance: what is squared and weighed, for each layer, loop and token: `relative` to the square of the teacher's
            own output, so that beta means the same for any teacher, width, layer and loop (our choice); or the square's
            `sum` over the width, as the paper writes it, or its `mean`, as the paper may mean it.
        detach_rows: let no gradient flow from a chunk into the rows of earlier ones: less to compute, but no row learns
            what later chunks need of it.
        decode_aware_from: the share of the steps after which batches may run the reply as `token` mode decodes it; 1
            never does.
        decode_aware_share: the share of those batches that do.
        decode_aware_by: `tokens` runs it token by token, exactly, and not in packs; `passes` (our choice) runs every
            chunk twice, all its tokens at once, whatever the reply's length (modeling/README.md, section 3).
        chunk_sizes: each batch runs at one of these C, drawn at random, so that the model can be served at any of them
            (our choice); by default at the C it is made for.
        loop_price: what a token's loop costs, in nats, mean over all tokens. Above 0, tokens leave their loops as
            the exit gate says, each at a threshold of its own drawn at random, and the gate learns which loops are
            worth their price: by their effect on the replies, also through the rows of tokens that answer nothing
            (our choice; Ouro trains its gate on a token's own loss).
        exit_share: the share of batches in which tokens leave; in the others they run all loops, so that the model
            does not forget how.
    """

    gate_learning_rate: Rate = 3e-3
    loss_on: Tokens = "reply"
    kd_at: Loops = "all"
    interpolate: bool = False
    alignment: Rate = 0.0
    distance: Distance = "relative"
    detach_rows: bool = False
    decode_aware_from: Share = 1.0
    decode_aware_share: Share = 0.5
    decode_aware_by: DecodeAwareBy = "passes"
    chunk_sizes: tuple[Count, ...] = ()
    loop_price: Rate = 0.0
    exit_share: Share = 0.5
