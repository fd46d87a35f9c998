"""What is measured: shapes, and one engine's checkpoint of a shape. Weights are random, so a config is enough.

`--help` reads this, so transformers, which a config needs, is imported only when a config is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from melt_serve.bundled import MELT

if TYPE_CHECKING:
    from melt_serve.config import DecodeMode, LoopLMConfig

Model = Literal["melt", "looplm"]
Dtype = Literal["bfloat16", "float32"]
DTYPES: tuple[Dtype, Dtype] = get_args(Dtype)
VALUE_BYTES: Mapping[Dtype, int] = {"bfloat16": 2, "float32": 4}
MODELS: tuple[Model, Model] = get_args(Model)

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
    decode_mode: "DecodeMode | None" = None

    @property
    def config(self) -> "LoopLMConfig":
        """The checkpoint's `config.json`."""
        from melt_serve.config import LoopLMConfig, MeltConfig

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

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Return the bytes of one token's final rows, over all layers."""
        from melt_serve.config import kv_bytes_per_token

        return kv_bytes_per_token(self.config, bytes_per_value)

    def __str__(self) -> str:
        """Return the model's name for the screen, with the decode mode."""
        return f"MELT, {self.decode_mode} mode" if self.decode_mode else "LoopLM"


def shape(name: str) -> dict[str, object]:
    """Return the sizes of a shape: `demo` is the bundled checkpoint's, `melt-1.6b` Ouro-1.4B's, `small` for a CPU."""
    from melt_serve.capacity import SHAPES
    from melt_serve.config import MeltConfig

    if name == "small":
        return scaled_shape(layers=2, hidden=256)
    if name == "melt-1.6b":
        return dict(SHAPES["ouro-1.4b"])
    own = ("chunk_size", "decode_mode", "effort_loops", *DEPENDS_ON_THE_ENGINE)
    return {key: value for key, value in MeltConfig.from_pretrained(MELT).to_diff_dict().items() if key not in own}


def scaled_shape(layers: int, hidden: int) -> dict[str, object]:
    """Return Ouro's proportions at another size: heads of 64, an MLP of 2.75 times the hidden size.

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
