"""What a LoopLM or MELT checkpoint states about itself in `config.json`.

Imports nothing of ours: the reference model, the converter and the vLLM engine all stand on it.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

if TYPE_CHECKING:
    from torch import Tensor

Positions = TypeVar("Positions", int, "Tensor")
GateType = Literal["elementwise", "scalar", "mean", "ema", "last"]
InitialState = Literal["input", "zeros"]
GateBias = Literal["shared", "loop"]
DecodeMode = Literal["token", "chunk"]
DECODE_MODES: tuple[DecodeMode, ...] = get_args(DecodeMode)
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)

EMA_KEEP = 0.2
"""The old state's share in gate type `ema`. Our choice: the paper does not say which of the two 0.2 weighs."""

AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "total_ut_steps",
)


AT_MOST = {
    "num_hidden_layers": 1024,
    "max_position_embeddings": 1 << 24,
    "total_ut_steps": 1024,
    "max_loops": 1024,
    "chunk_size": 1 << 18,
}
"""Bounds, far beyond any model, of what no tensor's shape implies: a wrong number would take all memory before it is
noticed."""


@strict
class LoopLMConfig(PreTrainedConfig):
    """A looped language model: N layers applied `total_ut_steps` times with the same weights.

    Field names are Ouro's (arXiv 2510.25741), so that its published checkpoints load as they are.
    The defaults are Ouro-1.4B's shape.

    `total_ut_steps` is the number of loops run by default, `max_loops` the most that a request may ask for (by default
    no more than that). `effort_loops` says what OpenAI's `reasoning_effort` means, where it should not mean what
    `loops_by_effort` says.

    Raises:
        StrictDataclassClassValidationError: a field's value cannot be; the message names it.
    """

    model_type = "ouro"
    family = "LoopLM"
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 1_000_000.0

    vocab_size: int = 49_152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65_536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: int | float | None = 0.0
    use_sliding_window: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    total_ut_steps: int = 4
    early_exit_threshold: float | int = 1.0
    max_loops: int | None = None
    effort_loops: dict[str, int] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)  # no heads are refused below
        stated = {(self.rope_parameters or {}).get("rope_theta"), kwargs.get("rope_theta")} - {None}
        if len(stated) > 1:
            raise ValueError(f"rope_theta is stated twice, as {' and as '.join(sorted(map(str, stated)))}: keep one")  # type: ignore[type-var]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse shapes and options that neither the reference model nor the engine computes."""
        assert self.num_key_value_heads is not None
        for field in AT_LEAST_ONE:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field, most in AT_MOST.items():
            if (getattr(self, field, None) or 0) > most:
                raise ValueError(f"{field} must be at most {most}, not {getattr(self, field)}")
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be above 0 and below 1, not {self.rms_norm_eps}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r}: a LoopLM's MLP is SwiGLU, so it must be 'silu'")
        if self.use_sliding_window:
            raise ValueError("use_sliding_window=true: sliding-window attention is not supported")
        if self.attention_dropout:
            raise ValueError(f"attention_dropout={self.attention_dropout}: attention dropout is not supported")
        if set(getattr(self, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(f"layer_types={self.layer_types}: only 'full_attention' is supported")
        rope = self.rope_parameters or {}
        if (rope_type := rope.get("rope_type", "default")) != "default":
            raise ValueError(f"rope_type={rope_type!r}: only 'default' rotary embeddings are supported")
        if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"partial_rotary_factor={share}: only rotary embeddings of whole heads are supported")
        theta = rope.get("rope_theta", self.default_theta)
        if not (isinstance(theta, int | float) and 0 < theta < math.inf):
            raise ValueError(f"rope_theta must be a positive number, not {theta!r}")

    def validate_token_ids(self) -> None:
        """Refuse special tokens that the vocabulary does not have: an answer could never end with one."""
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{field}={value} is outside the vocabulary, 0..{self.vocab_size - 1}")

    def validate_depth(self) -> None:
        """Refuse thresholds that are no probability, unknown efforts, and loops this checkpoint does not run."""
        if getattr(self, "early_exit_step", None) is not None:
            raise ValueError(
                f"early_exit_step={self.early_exit_step} is not supported: state the loops to run as total_ut_steps"
            )
        if not 0 < self.early_exit_threshold <= 1:
            raise ValueError(
                f"early_exit_threshold={self.early_exit_threshold} must be above 0 and at most 1 (no exits)"
            )
        if not 1 <= self.total_ut_steps <= self.most_loops:
            raise ValueError(f"total_ut_steps={self.total_ut_steps} is outside 1..max_loops={self.most_loops}")
        for effort, loops in (self.effort_loops or {}).items():
            if effort not in EFFORTS:
                raise ValueError(f"effort_loops: {effort!r} is none of {', '.join(EFFORTS)}")
            if not 1 <= loops <= self.most_loops:
                raise ValueError(f"effort_loops: {effort}={loops} is outside 1..max_loops={self.most_loops}")

    @property
    def most_loops(self) -> int:
        """The most loops that a request may ask for."""
        return self.total_ut_steps if self.max_loops is None else self.max_loops

    @property
    def loops_by_effort(self) -> dict[str, int]:
        """The loops each `reasoning_effort` asks for: `medium` is the default depth (our choice)."""
        default, most = self.total_ut_steps, self.most_loops
        shares = {
            "none": 1,
            "minimal": 1,
            "low": math.ceil(default / 2),
            "medium": default,
            "high": min(math.ceil(1.5 * default), most),
            "xhigh": min(2 * default, most),
            "max": most,
        }
        return shares | (self.effort_loops or {})

    @property
    def rope_base(self) -> float:
        """The base wavelength of the rotary embeddings."""
        return float((self.rope_parameters or {}).get("rope_theta", self.default_theta))


@strict
class MeltConfig(LoopLMConfig):
    """A LoopLM that keeps one KV row a (layer, token), rewritten at every loop (arXiv 2605.07721).

    `chunk_size` (C) and `decode_mode` define which rows a token attends to, so they belong to the checkpoint: the same
    weights under another C are another model.
    `kv_gate_rank`, of an element-wise gate, makes W_z and U_z products of [d, rank] and [rank, d] (our
    addition); None leaves them whole. `kv_gate_bias` says whether all loops share one b_z, or each loop
    from the second on has its own (our addition).
    """

    model_type = "melt"
    family = "MELT"

    kv_gate_type: GateType = "elementwise"
    kv_gate_initial_state: InitialState = "input"
    kv_gate_rank: int | None = None
    kv_gate_bias: GateBias = "shared"
    chunk_size: int = 512
    decode_mode: DecodeMode = "token"

    def __post_init__(self, **kwargs: object) -> None:
        if self.max_loops is None:
            self.max_loops = self.total_ut_steps
        super().__post_init__(**kwargs)

    def validate_gate(self) -> None:
        """Refuse ranks and biases that no gate has."""
        rank = self.kv_gate_rank
        if rank is not None and self.kv_gate_type != "elementwise":
            raise ValueError(f"kv_gate_rank={rank}: only an elementwise gate has a rank, not {self.kv_gate_type!r}")
        if rank is not None and not 1 <= rank <= self.hidden_size:
            raise ValueError(f"kv_gate_rank={rank} is outside 1..hidden_size={self.hidden_size}")
        if self.kv_gate_bias == "loop" and not gate_width(self):
            raise ValueError(f"kv_gate_bias='loop': a gate of type {self.kv_gate_type!r} learns no bias")
        if self.kv_gate_bias == "loop" and self.kv_gate_initial_state != "input":
            raise ValueError(
                f"kv_gate_bias='loop': loop 1 has no bias of its own, so kv_gate_initial_state must be 'input', "
                f"not {self.kv_gate_initial_state!r}"
            )

    def validate_chunks(self) -> None:
        """Refuse chunk sizes that no sequence can be cut by."""
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {self.chunk_size}")


def shape_facts(config: LoopLMConfig) -> dict[str, Any]:
    """Return the fields that hold for a config of the other class, and at other loops: no architecture, no efforts."""
    names = ("model_type", "architectures", "auto_map", "effort_loops")
    return {key: value for key, value in config.to_dict().items() if key not in names}


def kv_bytes_per_token(config: LoopLMConfig, bytes_per_value: int, loops: int | None = None) -> int:
    """Count the KV-cache bytes of one token over all layers (K and V of N layers, times T for a LoopLM).

    Args:
        config: a LoopLM's or a MELT's shape; a MELT's rows do not depend on the loops.
        bytes_per_value: size of one K or V element, 2 for bfloat16.
        loops: T of a LoopLM, by default the most that its requests may ask for.
    """
    assert config.num_key_value_heads is not None and config.head_dim is not None
    one_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value
    return one_row if isinstance(config, MeltConfig) else one_row * (loops or config.most_loops)


def chunk_start(position: Positions, chunk_size: int) -> Positions:
    """Return the first position of the chunk that holds `position`, both counted from 0 in their own sequence."""
    return position // chunk_size * chunk_size


def chunk_end(position: Positions, chunk_size: int) -> Positions:
    """Return the first position after the chunk that holds `position`."""
    return chunk_start(position, chunk_size) + chunk_size


def on_grid(tokens: int, chunk_size: int) -> int:
    """Round a number of tokens up to whole chunks."""
    return -(-tokens // chunk_size) * chunk_size


def sharing_unit(chunk_size: int, block_size: int) -> int:
    """Return the tokens between two positions where a chunk and a KV block end together: lcm(C, block)."""
    return math.lcm(chunk_size, block_size)


def gate_width(config: MeltConfig) -> int:
    """Return the gate values of a token: one a dimension (`elementwise`), one (`scalar`), or none to learn."""
    return {"elementwise": config.hidden_size, "scalar": 1}.get(config.kv_gate_type, 0)


def gate_biases(config: MeltConfig) -> int:
    """Return how many b_z a gate with a bias a loop has: one for each loop from the second to `max_loops`."""
    assert config.max_loops is not None
    return max(config.max_loops - 1, 1)  # of one loop none is needed, but an empty tensor is none that files hold well


def weight_shapes(config: LoopLMConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor of a checkpoint of this config, as (key, shape), in the order they are used."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    d, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, shape in (("q", (q, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, q))):
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        if isinstance(config, MeltConfig) and (width := gate_width(config)):
            gate, read = f"{layer}.self_attn.kv_gate", config.kv_gate_rank or d
            if config.kv_gate_rank:
                yield f"{gate}.input_down.weight", (read, d)
            yield f"{gate}.input_proj.weight", (width, read)
            if config.kv_gate_bias == "shared":
                yield f"{gate}.input_proj.bias", (width,)
            else:
                yield f"{gate}.loop_bias", (gate_biases(config), width)
            if config.kv_gate_rank:
                yield f"{gate}.state_down.weight", (read, d)
            yield f"{gate}.state_proj.weight", (width, read)
        for name, shape in (("gate", (mlp, d)), ("up", (mlp, d)), ("down", (d, mlp))):
            yield f"{layer}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"):
            yield f"{layer}.{name}.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "model.early_exit_gate.weight", (1, d)
    yield "model.early_exit_gate.bias", (1,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, d)


def register() -> None:
    """Register both model types with `AutoConfig`. Harmless when called again."""
    AutoConfig.register(LoopLMConfig.model_type, LoopLMConfig, exist_ok=True)
    AutoConfig.register(MeltConfig.model_type, MeltConfig, exist_ok=True)


register()
