"""What is measured: shapes, and one engine's checkpoint of a shape. Weights are random, so a config is enough."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from melt_serve.bundled import MELT
from melt_serve.capacity import SHAPES
from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig

Model = Literal["melt", "looplm"]
MODELS: tuple[Model, ...] = get_args(Model)

BLOCK_SIZE = 32
"""Tokens in a KV block, the finest vLLM's CPU attention takes; the same for both models, so that capacities compare."""

DEPENDS_ON_THE_ENGINE = ("model_type", "architectures", "dtype", "total_ut_steps", "max_loops")


@dataclass(frozen=True)
class Checkpoint:
    """A MELT or a LoopLM of some shape.

    Attributes:
        facts: sizes, as in `config.json`.
        loops: T.
        chunk_size: C; a LoopLM has none.
        decode_mode: None for a LoopLM.
    """

    facts: Mapping[str, object]
    model: Model
    loops: int
    chunk_size: int
    decode_mode: DecodeMode | None = None

    @property
    def config(self) -> LoopLMConfig:
        """Its `config.json`."""
        facts = {**self.facts, "total_ut_steps": self.loops}
        if self.model == "looplm":
            return LoopLMConfig(**facts, architectures=["OuroForCausalLM"])
        return MeltConfig(
            **facts,
            max_loops=self.loops,
            chunk_size=self.chunk_size,
            decode_mode=self.decode_mode,
            architectures=["MeltForCausalLM"],
        )

    def __str__(self) -> str:
        """How it is called on the screen."""
        return f"MELT, {self.decode_mode} mode" if self.decode_mode else "LoopLM"


def shape(name: str) -> dict[str, object]:
    """The sizes of a shape with a name: `demo` is the bundled checkpoint's, `melt-1.6b` Ouro-1.4B's, `small` any."""
    if name == "small":
        return scaled_shape(layers=2, hidden=256)
    if name == "melt-1.6b":
        return dict(SHAPES["ouro-1.4b"])
    own = ("chunk_size", "decode_mode", *DEPENDS_ON_THE_ENGINE)
    return {key: value for key, value in MeltConfig.from_pretrained(MELT).to_diff_dict().items() if key not in own}


def scaled_shape(layers: int, hidden: int) -> dict[str, object]:
    """Ouro's proportions at another size: heads of 64, an MLP of 2.75 times the hidden size.

    The vocabulary is 8 times the hidden size, so that with 8 layers and 4 loops the head does 2% of the work,
    as it does in Ouro-1.4B.
    """
    return {
        "vocab_size": 8 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "head_dim": 64,
    }
