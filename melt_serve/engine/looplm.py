"""LoopLMs in vLLM: the same layers run T times, with KV rows of every loop. Laid beside modeling/looplm.py."""

from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from melt_serve.config import LoopLMConfig

RowsT = TypeVar("RowsT", bound=Attention)
MLP_WEIGHTS = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
"""Where a checkpoint's gate and up projections lie in vLLM's stacked layer."""


class OuroAttention(nn.Module):
    """A LoopLM's attention: every loop has rows of its own, so a vLLM `Attention` of its own; there is no state h."""

    def __init__(self, config: LoopLMConfig, vllm_config: VllmConfig, prefix: str, layer: int):
        super().__init__()
        assert config.num_key_value_heads is not None and config.head_dim is not None
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_size = heads // get_tensor_model_parallel_world_size() * config.head_dim
        self.kv_size = local_kv_heads(config) * config.head_dim
        quant = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            heads,
            kv_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = rotary_embedding(config)
        self.attn = nn.ModuleList(
            paged_attention(Attention, config, vllm_config, prefix=f"{cache_name(config, prefix, layer, loop)}.attn")
            for loop in range(config.total_ut_steps)
        )

    def forward(self, positions: Tensor, n: Tensor, h: None, loop: int) -> tuple[Tensor, None]:
        """Return W_O attn(...), [tokens, hidden], at loop t = `loop`, counted from 1, and no state."""
        qkv, _ = self.qkv_proj(n)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn[loop - 1](q, k, v))
        return output, None


class LoopedDecoderLayer(nn.Module):
    """A layer with sandwich norms; the residual stream travels beside x, as vLLM's fused norms need it."""

    def __init__(
        self,
        attention: type[nn.Module],
        config: LoopLMConfig,
        vllm_config: VllmConfig,
        prefix: str,
        layer: int,
    ):
        super().__init__()
        self.self_attn = attention(config, vllm_config, prefix=f"{prefix}.self_attn", layer=layer)
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm_2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: Tensor, x: Tensor, residual: Tensor | None, h: Tensor | None, loop: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, residual and a MELT's h, all [tokens, hidden]; x + residual is the residual stream."""
        if residual is None:
            n, residual = self.input_layernorm(x), x
        else:
            n, residual = self.input_layernorm(x, residual)
        attended, h = self.self_attn(positions, n, h, loop)
        x, residual = self.post_attention_layernorm(self.input_layernorm_2(attended), residual)
        return self.post_attention_layernorm_2(self.mlp(x)), residual, h


class LoopedModel(nn.Module):
    """Embeddings, N layers, and the norm that closes every loop."""

    attention: ClassVar[type[nn.Module]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: LoopLMConfig = vllm_config.model_config.hf_config
        self.loops = config.total_ut_steps
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.layers = nn.ModuleList(
            LoopedDecoderLayer(self.attention, config, vllm_config, prefix=f"{prefix}.layers.{i}", layer=i)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def run_loop(
        self, positions: Tensor, x: Tensor, h: Tensor | None, loop: Tensor | int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run all layers once; return the normed state, [tokens, hidden], and each layer's new h.

        Args:
            h: [N, tokens, hidden], a MELT's states after the loop before; None at loop 1.
            loop: t, counted from 1.
        """
        residual = None
        states: list[Tensor | None] = []
        for i, layer in enumerate(self.layers):
            x, residual, state = layer(positions, x, residual, None if h is None else h[i], loop)
            states.append(state)
        x, _ = self.norm(x, residual)
        return x, states


@support_torch_compile
class OuroModel(LoopedModel):
    """The layers of a LoopLM, run T times."""

    attention = OuroAttention

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the normed state after the last loop, [tokens, hidden], for tokens as vLLM packs them."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for loop in range(1, self.loops + 1):
            x, _ = self.run_loop(positions, x, None, loop)
        return x


class LoopedForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """What both architectures share: a language-model head on the loops, and the loading of weights."""

    backbone: ClassVar[type[LoopedModel]]
    hf_to_vllm_mapper: ClassVar[WeightsMapper]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: LoopLMConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = self.backbone(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed [tokens] as [tokens, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **of_step: Any,
    ) -> Tensor:
        """Return the normed state after the last loop, [tokens, hidden]; a MELT takes the step's plan, too."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, **of_step)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Map [tokens, hidden] to logits, [tokens, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, as the mapper renames them."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class OuroForCausalLM(LoopedForCausalLM):
    """The architecture of `ouro` checkpoints: a LoopLM, with KV rows of every loop.

    vLLM itself had one up to 0.25. Nothing of MELT's contract concerns it: it runs under vLLM's own scheduler.
    """

    backbone = OuroModel
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            **MLP_WEIGHTS,
        },
        orig_to_new_prefix={"model.early_exit_gate.": None},  # here every token runs all loops
    )
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }


def local_kv_heads(config: LoopLMConfig) -> int:
    """Return the number of KV heads on this rank; where there are fewer heads than ranks, ranks share them."""
    assert config.num_key_value_heads is not None
    return max(1, config.num_key_value_heads // get_tensor_model_parallel_world_size())


def rotary_embedding(config: LoopLMConfig) -> nn.Module:
    """Return vLLM's module for RoPE on whole heads."""
    assert config.head_dim is not None
    return get_rope(
        config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
    )


def cache_name(config: LoopLMConfig, prefix: str, layer: int, loop: int) -> str:
    """Name one loop's rows of a layer.

    vLLM reads a layer's number off its name: these are the names of a model with T times N layers.
    """
    return prefix.replace(f".{layer}.", f".{loop * config.num_hidden_layers + layer}.")


def paged_attention(kind: type[RowsT], config: LoopLMConfig, vllm_config: VllmConfig, prefix: str) -> RowsT:
    """Make one set of KV rows under the name `prefix`, with the attention over them."""
    assert config.head_dim is not None
    return kind(
        config.num_attention_heads // get_tensor_model_parallel_world_size(),
        config.head_dim,
        config.head_dim**-0.5,
        num_kv_heads=local_kv_heads(config),
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )
