"""The ablations: which recipes are compared, at which size, and what the paper says of them (arXiv 2605.07721).

The paper names its ablations in a few words; what they are here:

- *without attention alignment*: beta = 0; phase 2 goes on with L_KD alone.
- *without interpolation*: alpha = 1 from the first step; as many steps.
- *without distillation at all loops*: L_KD compares the last loop's answers only, in both phases.
- *without chunks*: C is the whole sequence in training, so that no token ever reads another's final row before its own
  last loop, and no batch is decode-aware. It is served in both decode modes with the size's C, and in one chunk, where
  `token` mode still decodes from final rows; `chunk` mode in one chunk would keep every loop's rows, as a LoopLM does.
- *conversion only*: the teacher with a fresh gate.

Gates are compared without attention alignment, as the paper compares them before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from melt_serve.config import GateType
from melt_serve.train.recipe import DEPTHS, GateStart, Recipe, TrainBase
from melt_serve.train.studies.cheap_gates import CheapGate

WHOLE_SEQUENCE = 2048
"""A chunk that no question of the task fills."""


@dataclass(frozen=True)
class Size:
    """The size of an ablation's runs.

    Attributes:
        steps: of phase 1 and of phase 2.
        batch: questions a step.
        loops: each batch runs one of these.
        chunk_size: C, where a variant does not say otherwise.
        questions: held out, to measure on.
        minutes: that a run took with one thread on 2 CPU cores, for `--list` before any is done.
    """

    name: str
    steps: tuple[int, int]
    batch: int
    loops: tuple[int, ...]
    warmup: int
    chunk_size: int
    questions: int
    minutes: float


SIZES = {
    size.name: size
    for size in (
        Size("small", (40, 80), 4, (3, 4), 10, 16, 80, 2.5),
        Size("demo", (300, 500), 24, DEPTHS, 30, 32, 1000, 40),
    )
}


@dataclass(frozen=True)
class Variant:
    """One way to post-train, as changes of the full recipe.

    Attributes:
        what: in words.
        start: the bundled checkpoint it begins with: the LoopLM with a fresh gate, or the MELT, whose trained gate is
            made as cheap as `cheap_gate` says.
        gate_type, cheap_gate: the gate.
        gate_start: how a fresh gate starts; None for the recipe's.
        train_base, lora_rank: what is trained beside the gate, see `PostTraining`.
        chunk_size: C in training; None for the size's.
        transition, alignment: changed fields of phases 1 and 2.
        paper: what the paper reports of it.
    """

    name: str
    what: str
    start: Literal["looplm", "melt"] = "looplm"
    gate_type: GateType = "elementwise"
    cheap_gate: CheapGate | None = None
    gate_start: GateStart | None = None
    train_base: TrainBase = "full"
    lora_rank: int | None = None
    chunk_size: int | None = None
    transition: Mapping[str, Any] = field(default_factory=dict)
    alignment: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""

    def seeds(self, asked: Sequence[int]) -> Sequence[int]:
        """Choose the seeds that make a difference: one is enough where nothing is fresh and nothing is trained."""
        return asked[:1] if self.start == "melt" else asked

    def served_chunk_sizes(self, size: Size) -> tuple[int, ...]:
        """Return C as it was trained; without chunks, the size's first: no server keeps all loops of a sequence."""
        if self.chunk_size == WHOLE_SEQUENCE:
            return (size.chunk_size, WHOLE_SEQUENCE)
        return (self.chunk_size or size.chunk_size,)

    def recipe(self, size: Size, seed: int) -> Recipe:
        """Return the whole recipe; only shape, gate_start, seed, `transition` and `alignment` are used."""
        demo = Recipe().seeded(seed)
        common = {"batch": size.batch, "loops": size.loops, "warmup": size.warmup}
        first, second = ({"steps": steps, **common} for steps in size.steps)
        return replace(
            demo,
            gate_start=demo.gate_start if self.gate_start is None else self.gate_start,
            shape=replace(demo.shape, chunk_size=self.chunk_size or size.chunk_size),
            transition=replace(demo.transition, **{**first, **self.transition}),
            alignment=replace(demo.alignment, **{**second, **self.alignment}),
        )

    def gate_multiply_adds(self, hidden_size: int, loops: int) -> int:
        """Count those of the gate's matrices, for one token in one layer over T loops; the first has no gate."""
        if self.cheap_gate is not None:
            return self.cheap_gate.multiply_adds(hidden_size, loops)
        width = {"elementwise": hidden_size, "scalar": 1}.get(self.gate_type, 0)
        return 2 * hidden_size * width * (loops - 1)


GRID_ONLY = {"decode_aware_from": 1.0}
NO_ALIGNMENT = {"alignment": 0.0}
TO_THE_LETTER = {"alignment": 0.1, "distance": "sum"}
DRAWN_CHUNKS = {"chunk_sizes": (8, 16, 32, 64)}
UNTRAINED = {"steps": 0}
FULL = Variant("full", "the recipe `demo`")
RECIPE = (
    FULL,
    Variant("no-alignment", "beta = 0", alignment=NO_ALIGNMENT, paper="2 to 3 points less"),
    Variant("converted", "a fresh gate, no step of training", transition=UNTRAINED, alignment=UNTRAINED),
    Variant("no-interpolation", "alpha = 1 from the start", transition={"interpolate": False}, paper="about 10 less"),
    Variant(
        "last-loop-kd",
        "L_KD of the last loop only, both phases",
        transition={"kd_at": "last"},
        alignment={"kd_at": "last"},
        paper="less than without interpolation",
    ),
    Variant(
        "no-chunks",
        "trained with C = the whole sequence, no decode-aware batches",
        chunk_size=WHOLE_SEQUENCE,
        alignment=GRID_ONLY,
        paper="0.0",
    ),
    Variant(
        "detached",
        "no gradient through the rows of earlier chunks, both phases",
        transition={"detach_rows": True},
        alignment={"detach_rows": True},
    ),
    Variant("grid-only", "no decode-aware batches: the paper's own recipe", alignment=GRID_ONLY),
    Variant("two-passes", "decode-aware batches by two passes", alignment={"decode_aware_by": "passes"}),
    Variant("summed", "beta = 0.1 of the summed square: the formula to the letter", alignment=TO_THE_LETTER),
    Variant("closed", "the gate starts at b_z = -2 in all loops: z near 0.12", gate_start=-2.0),
)


def gated(name: str, what: str, paper: str = "", **gate: Any) -> Variant:
    """Describe a gate, trained without attention alignment: the paper compares gates before it; so they differ more."""
    return Variant(name, what, alignment=NO_ALIGNMENT, paper=paper, **gate)


ELEMENTWISE = gated("elementwise", "the paper's gate, full W_z and U_z", "77.7")
SCALAR = gated("scalar", "one z a token", "66.9", gate_type="scalar")
LAST = gated("last", "h_t = n_t: the last loop's row, nothing to learn", "69.7", gate_type="last")
GATES = (
    ELEMENTWISE,
    LAST,
    gated("rank-24", "W_z, U_z of rank 24 (d/8)", cheap_gate=CheapGate(rank=24)),
    gated("constant", "z = sigmoid(b_z): d learned constants (rank 0)", cheap_gate=CheapGate(rank=0)),
    gated("blocks-8", "W_z, U_z of 8 blocks", cheap_gate=CheapGate(blocks=8)),
    gated("shared-half", "loop 3 uses the z of loop 2", cheap_gate=CheapGate(shared=True)),
    gated("diagonal", "W_z, U_z of d blocks: z_i of n_i and h_i alone", cheap_gate=CheapGate(blocks=192)),
    gated("rank-6", "W_z, U_z of rank 6 (d/32)", cheap_gate=CheapGate(rank=6)),
    SCALAR,
)


def compressed(name: str, what: str, cheap_gate: CheapGate | None) -> Variant:
    """Describe the bundled MELT with its trained gate replaced by the nearest cheap one, not trained any further."""
    of_demo: dict[str, Any] = {"chunk_size": Recipe().shape.chunk_size, "transition": UNTRAINED, "alignment": UNTRAINED}
    return Variant(name, what, start="melt", cheap_gate=cheap_gate, **of_demo)


COMPRESSED = (
    compressed("as-trained", "the bundled MELT", None),
    *(compressed(f"to-rank-{rank}", f"rank {rank} of 192", CheapGate(rank=rank)) for rank in (96, 48, 24, 12, 6, 3, 1)),
    *(compressed(f"to-blocks-{blocks}", f"{blocks} blocks", CheapGate(blocks=blocks)) for blocks in (2, 8, 192)),
    compressed("to-bias", "z = sigmoid(b_z)", CheapGate(rank=0)),
    compressed("to-shared-half", "loop 3 uses the z of loop 2", CheapGate(shared=True)),
)
PAPER_GATES = (
    ELEMENTWISE,
    LAST,
    gated("mean", "h_t is the mean of n_1..n_t", "68.8", gate_type="mean"),
    gated("ema", "h_t = 0.2 h_{t-1} + 0.8 n_t", "68.6", gate_type="ema"),
    SCALAR,
    gated("half-open", "element-wise, starts at b_z = 0 in all loops: z near 1/2", gate_start=0.0),
    gated("closed", "element-wise, starts at b_z = -2 in all loops: z near 0.12", gate_start=-2.0),
)
CHUNKS = (
    FULL,
    *(Variant(f"chunk-{size}", f"trained and served with C = {size}", chunk_size=size) for size in (8, 32, 64)),
    Variant("drawn", "each batch's C drawn of 8, 16, 32 and 64", transition=DRAWN_CHUNKS, alignment=DRAWN_CHUNKS),
)
ADAPTERS: dict[str, Any] = {"train_base": "lora", "lora_rank": 8}
ADAPTERS_RATE = {"learning_rate": 3e-3}
"""Adapters start fresh, as the gate does, and have its rate: ten times that of a whole base."""


def longer(share: float, **fields: Any) -> dict[str, Any]:
    """Return stages of so many times the steps of size `small`, for as much CPU time as a whole base's take.

    A step took 0.78 of its CPU time with a frozen base, 0.93 with adapters (2026-11-28, one of 2 cores, AMD EPYC).
    """
    first, second = (round(share * steps) for steps in SIZES["small"].steps)
    return {"transition": {"steps": first, **fields}, "alignment": {"steps": second, **fields}}


BASE = (
    FULL,
    Variant("frozen", "the base is the teacher's: the gate alone is trained", train_base="frozen"),
    Variant("lora", "beside it adapters of rank 8", transition=ADAPTERS_RATE, alignment=ADAPTERS_RATE, **ADAPTERS),
    Variant("frozen-longer", "frozen, the CPU time of `full`", train_base="frozen", **longer(1.28)),
    Variant("lora-longer", "adapters, the CPU time of `full`", **ADAPTERS, **longer(1.07, **ADAPTERS_RATE)),
)
STUDIES: dict[str, tuple[Variant, ...]] = {
    "gates": GATES,
    "compressed": COMPRESSED,
    "recipe": RECIPE,
    "paper-gates": PAPER_GATES,
    "chunks": CHUNKS,
    "base": BASE,
}
