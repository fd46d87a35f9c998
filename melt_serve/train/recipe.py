"""Every choice of a training run, typed. Where the paper is silent the choice is ours.

Plain dataclasses; `recipe_files.py` checks what files and command lines say against the types here.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from melt_serve.config import DecodeMode, GateType, MeltConfig, gate_width
from melt_serve.train.stages import FORBID, Count, Distillation, Pretraining, Share

Dtype = Literal["float32", "bfloat16"]
Paths = Annotated[
    tuple[str, ...], BeforeValidator(lambda one: (one,) if isinstance(one, str) else one), Field(min_length=1)
]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda one: (one,) if isinstance(one, str) else one)]
TrainBase = Literal["full", "frozen", "lora"]


def known_start(value: object) -> object:
    """Refuse what is no start of a gate.

    Raises:
        ValueError: it is neither `mean` nor a finite number.
    """
    if value == "mean" or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
        return value
    raise ValueError(f"gate_start={value!r}: it must be 'mean', or a number, the b_z that all loops share")


GateStart = Annotated[Literal["mean"] | float, BeforeValidator(known_start)]
"""How a fresh gate starts: `mean`, with a bias a loop, as the running mean of n_1..n_t; or with this b_z in all loops.

Our choice. AdamW moves a weight by at most its rate a step, so a gate that starts at b_z = -2 hardly leaves it in the
paper's 800 steps; and the mean is near to where trained gates were found to end."""

DEPTHS = (1, 2, 3, 4, 4, 4, 6, 8)
"""Loops that the bundled MELT is post-trained at."""


@dataclass(frozen=True)
class Shape:
    """The models' shape; the student has the teacher's, and a gate."""

    __pydantic_config__: ClassVar = FORBID

    hidden_size: Count = 192
    intermediate_size: Count = 576
    layers: Count = 1
    heads: Count = 6
    loops: Count = 4
    max_loops: Count = 8
    chunk_size: Count = 32


@dataclass(frozen=True)
class Recipe:
    """The recipe of the bundled checkpoints, made from nothing.

    Attributes:
        gate_start: see `GateStart`.
        shallow: a LoopLM of one loop on the teacher's data: what the same weights learn without depth.
        output: folder for both; by default they replace the bundled ones.
    """

    __pydantic_config__: ClassVar = FORBID

    shape: Shape = field(default_factory=Shape)
    gate_start: GateStart = "mean"
    seed: int = 0
    teacher: Pretraining = field(default=Pretraining(steps=1500, learning_rate=3e-3, loops=(4, 4, 5, 8)))
    shallow: Pretraining = field(default=Pretraining(steps=1500, learning_rate=3e-3, loops=(1,)))
    transition: Distillation = field(
        default=Distillation(steps=200, learning_rate=3e-4, loops=DEPTHS, interpolate=True, decay_from=1.0)
    )
    alignment: Distillation = field(
        default=Distillation(
            steps=300,
            learning_rate=3e-4,
            loops=DEPTHS,
            alignment=10.0,
            decode_aware_from=0.0,
            decode_aware_by="tokens",
        )
    )
    exits: Distillation = field(
        default=Distillation(
            steps=600,
            learning_rate=3e-4,
            loops=(2, 3, 4, 4, 6, 8, 8),
            decode_aware_from=0.0,
            decode_aware_by="tokens",
            loop_price=0.02,
        )
    )

    output: str | None = None

    def seeded(self, seed: int) -> "Recipe":
        """Return the same recipe with other weights and other data."""
        stages = {name: replace(getattr(self, name), seed=seed) for name in STAGES}
        return replace(self, seed=seed, **stages)


@dataclass(frozen=True)
class Data:
    """The data of a post-training, and how it is packed.

    Attributes:
        files: `.jsonl`, `.json` (also `.gz`) and `.parquet` files, folders that a Hugging Face dataset was saved to,
            and datasets on the hub, `OWNER/NAME[/CONFIG][@REVISION][:SPLIT]`; `data/records.py` says what a record
            is. `python -m melt_serve.train data` shows what a run would learn from them.
        weights: how often an epoch takes the records of each file, in their order: 2 twice, 0.5 a random half of them;
            by default once.
        learn: of a chat, all replies, or the last one only.
        pack: fill a sequence with documents that do not see each other; otherwise it is one document.
        streaming, window, too_long, broken: see `packing.Packing`; `broken` may change when a run goes on.
    """

    __pydantic_config__: ClassVar = FORBID

    files: Paths
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    learn: Literal["replies", "last"] = "replies"
    pack: bool = True
    streaming: bool = False
    window: Count = 1024
    too_long: Literal["cut", "split", "drop"] = "cut"
    broken: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.files):
            raise ValueError(
                f"data.weights: {len(self.weights)} of them, and {len(self.files)} data.files; give one each"
            )
        if self.weights is not None and self.streaming:
            raise ValueError("data.weights need a random order of all records; leave them out, or data.streaming")


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a run learns, on documents that it does not learn from.

    Attributes:
        files: as `Data.files`.
        steps: measured every so many, before the first step, and at the end of a stage.
        documents: so many are read, the first of the files; broken ones are left out.
        length: tokens of a document at most. In `token` mode its reply runs token by token, which is what this costs.
        samples: answers that are written down, to the first prompts.
        sample_tokens: of an answer, at most.
    """

    __pydantic_config__: ClassVar = FORBID

    files: Paths
    steps: Count = 50
    documents: Count = 32
    length: Annotated[int, Field(ge=2)] = 1024
    samples: Annotated[int, Field(ge=0)] = 2
    sample_tokens: Count = 64


@dataclass(frozen=True)
class PostTraining:
    """The recipe of a post-training: a LoopLM of one's own into a MELT.

    Attributes:
        teacher: folder of the LoopLM's checkpoint, in Ouro's format, or its name on the hub, OWNER/NAME[@REVISION].
        student: folder of a MELT of the teacher's shape to begin with, or its name on the hub; it keeps its own gate.
            By default the teacher's weights, with a fresh gate.
        output: folder of the MELT's checkpoint; replaced when all stages are done, and not before.
        chunk_size: C that the MELT is made for. A sequence may end inside a chunk, and a document begins on a multiple
            of `grid`.
        decode_mode: how the MELT is served. `chunk` (our choice) decodes from rows as training made them; `token`, as
            we read the paper, from others.
        gate_start: see `GateStart`.
        trained_rank: W_z and U_z are products of this rank from the start (our addition); by default they are whole.
        gate_rank: the trained gate's W_z and U_z are cut to this rank when the run is done: less to compute and to
            store (our addition; docs/studies.md says what it costs). By default they stay as they were trained.
        train_base: what is trained beside the gates: `full`, the whole base, as in the paper; `frozen`, nothing of it;
            or `lora`, low-rank adapters of q, k, v and o, merged in the end. But for `full` the base is the teacher's
            own, so its weights are there once, without gradients and optimizer states (our addition).
        lora_rank: the adapters' rank; only with `lora`, whose learning rate is that of the base.
        max_loops: the most the MELT may be asked for; by default the most it is trained for, or the teacher's own.
        sequence_length: tokens; see `Data` for longer documents.
        batch_tokens: sequences a step times their length, padding included.
        micro_batch: sequences that a process runs at once; the gradients of a step's are added up.
        dtype: `bfloat16`: weights and optimizer in float32, everything that is computed in bfloat16.
        checkpoint_chunks: keep only what a chunk takes and gives, and run it again in the backward pass.
        compile: let `torch.compile` fuse what is between the matmuls after a layer's attention: norms, sums, SwiGLU.
            Takes up to a minute at the start; a run that is resumed is the same up to rounding.
        save_steps, save_minutes: the run's state is saved when either has passed.
        keep_last, keep_every: of a stage, so many states that were saved last are kept in `states/`, and those of all
            multiples of so many steps.
        evaluation: held-out documents, and how often they are asked; by default nothing is.
        report_to: where the numbers are shown: `tensorboard`, `wandb`, or `module:function`, see `loop/loggers.py`.
        most_skipped: the share of a stage's steps whose gradient may be no number: they change nothing and are counted.
            One more ends the run.
        exits: none, or a stage that teaches tokens to leave early (our addition).
        further: stages after these, by names of their own.
        order: the names of the stages to run, in this order; by default transition, alignment, exits, and then
            `further`, as far as the recipe has them.
    """

    __pydantic_config__: ClassVar = FORBID

    teacher: str
    data: Data
    output: str
    transition: Distillation | None = None
    alignment: Distillation | None = None
    exits: Distillation | None = None
    student: str | None = None
    further: dict[str, Distillation] = field(default_factory=dict)
    order: tuple[str, ...] | None = None
    chunk_size: Count = 512
    decode_mode: DecodeMode = "chunk"
    gate_type: GateType = "elementwise"
    gate_start: GateStart = "mean"
    trained_rank: Count | None = None
    gate_rank: Count | None = None
    train_base: TrainBase = "full"
    lora_rank: Count | None = None
    max_loops: Count | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 10_000
    batch_tokens: Count = 320_000
    micro_batch: Count = 1
    dtype: Dtype = "bfloat16"
    checkpoint_chunks: bool = True
    compile: bool = False
    save_steps: Count = 50
    save_minutes: Annotated[float, Field(gt=0)] = 10.0
    keep_last: Annotated[int, Field(ge=0)] = 0
    keep_every: Count | None = None
    evaluation: Evaluation | None = None
    report_to: Names = ("tensorboard",)
    most_skipped: Share = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_tokens % (self.sequence_length * self.micro_batch):
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of sequence_length={self.sequence_length} * "
                f"micro_batch={self.micro_batch}; set one of them so that whole micro-batches fill a step"
            )
        for name in ("trained_rank", "gate_rank"):
            if (rank := getattr(self, name)) is not None and self.gate_type != "elementwise":
                raise ValueError(f"{name}={rank}: only an elementwise gate has a rank, not {self.gate_type!r}")
        if self.trained_rank is not None and self.gate_rank is not None:
            raise ValueError(
                f"trained_rank={self.trained_rank} and gate_rank={self.gate_rank}: a gate is trained at a rank or cut "
                "to one afterwards; leave one of them out"
            )
        if unnamed := [name for name in self.names if name not in self.tables]:
            raise ValueError(
                f"order: there is no stage {unnamed[0]!r}; the recipe has {', '.join(self.tables) or 'none'}"
            )
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"order={list(self.names)}: a recipe runs at least one stage, and each of them once")
        if taken := [name for name in self.further if name in PHASES or not re.fullmatch(r"\w[\w-]*", name)]:
            raise ValueError(f"further.{taken[0]}: name the stage otherwise, in letters, digits, - and _")
        self.check_base()
        if astray := [size for size in self.chunk_sizes if self.grid % size]:
            raise ValueError(
                f"chunk_sizes: {astray[0]} does not divide {self.grid}, the largest; documents of a pack begin on "
                "multiples of that, so it must be a multiple of all others"
            )
        for name, stage in self.stages.items():
            if self.student is not None and stage.interpolate:
                raise ValueError(
                    f"{name}.interpolate=true: a student that is a MELT has no rows of a LoopLM to begin with; set it "
                    f"to false, or leave the stage out of order"
                )
            if stage.decode_aware_from == 1:
                continue
            if self.decode_mode == "chunk":
                raise ValueError(
                    f"{name}.decode_aware_from={stage.decode_aware_from}: in chunk mode answers are decoded as the "
                    "grid is trained; set decode_mode=token, or decode_aware_from=1"
                )
            if self.data.pack and stage.decode_aware_by == "tokens":
                raise ValueError(
                    f"{name}.decode_aware_by='tokens': replies run token by token in documents of their own only; set "
                    "data.pack=false, or decode_aware_by=passes"
                )

    def check_base(self) -> None:
        """See that something is trained.

        Raises:
            ValueError: nothing is, in a stage; or the adapters' rank is missing, or there is one without adapters; or
                the base is both the teacher's and another MELT's.
        """
        if self.train_base == "lora" and self.lora_rank is None:
            raise ValueError("train_base='lora': it needs a rank of the adapters; set lora_rank, such as 16")
        if self.train_base != "lora" and self.lora_rank is not None:
            raise ValueError(f"lora_rank={self.lora_rank}: only train_base=lora has adapters, not {self.train_base!r}")
        if self.train_base != "full" and self.student is not None:
            raise ValueError(
                f"train_base={self.train_base!r}: the base is the teacher's then, and student={self.student} brings "
                "one of its own; leave one of them out"
            )
        if self.train_base != "frozen":
            return
        if gate_width(MeltConfig(kv_gate_type=self.gate_type)) == 0:
            raise ValueError(
                f"train_base='frozen': a gate of type {self.gate_type!r} learns nothing, so nothing would be trained; "
                "set train_base=lora, or another gate_type"
            )
        for name, stage in self.stages.items():
            if 1 in stage.loops:
                raise ValueError(
                    f"{name}.loops={list(stage.loops)}: one loop has no gate, so with train_base='frozen' there is "
                    "nothing to train in it; leave 1 out"
                )

    @property
    def chunk_sizes(self) -> set[int]:
        """All C that the stages run at, and the one that the MELT is made for."""
        return {self.chunk_size, *(size for stage in self.stages.values() for size in stage.chunk_sizes)}

    @property
    def grid(self) -> int:
        """The largest C; a pack's documents begin on multiples of it, so on those of every other C, too."""
        return max(self.chunk_sizes)

    @property
    def sequences(self) -> int:
        """Sequences a step, of all processes together."""
        return self.batch_tokens // self.sequence_length

    @property
    def stages(self) -> dict[str, Distillation]:
        """The stages by name, in the order they run, with the batch in sequences."""
        return {name: replace(self.tables[name], batch=self.sequences, seed=self.seed) for name in self.names}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stages, in the order they run."""
        return tuple(self.tables) if self.order is None else self.order

    @property
    def tables(self) -> dict[str, Distillation]:
        """All stages that the recipe describes, by name; which run, and when, `order` says."""
        own = {name: getattr(self, name) for name in PHASES}
        return {name: stage for name, stage in (own | self.further).items() if stage is not None}


PHASES = ("transition", "alignment", "exits")
STAGES = ("teacher", "shallow", "transition", "alignment", "exits")
