"""MELT and LoopLM (Ouro) from vLLM's own layers: N layers run T times, with one KV row a (layer, token), or T.

Compared with `melt_serve.modeling` in tests; see there for the math in its plainest form.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from melt_serve.config import LoopLMConfig, MeltConfig
from melt_serve.engine.attention import FinalRows, OpenRows, StepRows
from melt_serve.engine.depth import Depth, StepDepths
from melt_serve.engine.gate import KVGate
from melt_serve.engine.lora import TokenAdapters


class MeltAttention(nn.Module):
    """Queries from n, K and V rows from the gated state h.

    The cache keeps the row of the last loop: in `token` mode every loop writes the same slots again. In `chunk`
    mode the loops before a request's last write other slots, which last as long as their chunk is open.
    """

    def __init__(self, config: MeltConfig, vllm_config: VllmConfig, prefix: str, layer: int):
        super().__init__()
        assert config.num_key_value_heads is not None and config.head_dim is not None
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.kv_size = local_kv_heads(config) * config.head_dim
        quant = vllm_config.quant_config
        self.kv_gate = KVGate(config, vllm_config, prefix=f"{prefix}.kv_gate")
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, heads * config.head_dim, bias=False, quant_config=quant, prefix=f"{prefix}.q_proj"
        )
        self.kv_proj = QKVParallelLinear(
            config.hidden_size, config.head_dim, 0, kv_heads, bias=False, quant_config=quant, prefix=f"{prefix}.kv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = rotary_embedding(config)
        # First the final rows: their cache group and its tables come before those that are laid over them.
        self.attn = paged_attention(FinalRows, config, vllm_config, prefix=f"{prefix}.attn")
        assert config.max_loops is not None
        self.open_rows = nn.ModuleList(
            paged_attention(
                OpenRows, config, vllm_config, prefix=f"{cache_name(config, prefix, layer, loop)}.attn", loop=loop
            )
            for loop in (range(1, config.max_loops) if config.decode_mode == "chunk" else ())
        )

    def forward(self, positions: Tensor, n: Tensor, h: Tensor | None, loop: Tensor) -> tuple[Tensor, Tensor]:
        """W_O attn(...) and the new state h, both [tokens, hidden]."""
        h = self.kv_gate(n, h, loop)
        q, _ = self.q_proj(n)
        kv, _ = self.kv_proj(h)
        k, v = kv.split([self.kv_size, self.kv_size], dim=-1)
        output, _ = self.o_proj(self.attn.rotate_and_attend(positions, q, k, v, self.rotary_emb))
        return output, h

    def project_rows(self, positions: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """K and V rows of state h, [tokens, KV heads * head_dim] each, as `forward` writes them."""
        kv, _ = self.kv_proj(h)
        k, v = kv.split([self.kv_size, self.kv_size], dim=-1)
        k, _ = self.rotary_emb(positions, k.contiguous())
        return k, v


class OuroAttention(nn.Module):
    """A LoopLM's: every loop has rows of its own, so a vLLM `Attention` of its own; no state goes on."""

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
        """W_O attn(...), [tokens, hidden], at loop t = `loop`, counted from 1."""
        qkv, _ = self.qkv_proj(n)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn[loop - 1](q, k, v))
        return output, None


def local_kv_heads(config: LoopLMConfig) -> int:
    """KV heads on this rank; fewer heads than ranks are held by several."""
    assert config.num_key_value_heads is not None
    return max(1, config.num_key_value_heads // get_tensor_model_parallel_world_size())


def rotary_embedding(config: LoopLMConfig) -> nn.Module:
    """RoPE on whole heads."""
    assert config.head_dim is not None
    return get_rope(
        config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
    )


def cache_name(config: LoopLMConfig, prefix: str, layer: int, loop: int) -> str:
    """A name for one loop's rows of a layer.

    vLLM reads a layer's number off its name: these are the names of a model with T times N layers.
    """
    return prefix.replace(f".{layer}.", f".{loop * config.num_hidden_layers + layer}.")


def paged_attention(
    kind: type[Attention], config: LoopLMConfig, vllm_config: VllmConfig, prefix: str, **of_kind: object
) -> Attention:
    """One set of KV rows under this name, and the attention over them."""
    assert config.head_dim is not None
    return kind(
        config.num_attention_heads // get_tensor_model_parallel_world_size(),
        config.head_dim,
        config.head_dim**-0.5,
        num_kv_heads=local_kv_heads(config),
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        **of_kind,
    )


class LoopedDecoderLayer(nn.Module):
    """One layer with sandwich norms; the residual stream travels beside x, as vLLM's fused norms want it."""

    def __init__(
        self,
        attention: type[MeltAttention] | type[OuroAttention],
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
        """x, residual and a MELT's h after this layer, all [tokens, hidden]; x + residual is the residual stream."""
        if residual is None:
            n, residual = self.input_layernorm(x), x
        else:
            n, residual = self.input_layernorm(x, residual)
        attended, h = self.self_attn(positions, n, h, loop)
        x, residual = self.post_attention_layernorm(self.input_layernorm_2(attended), residual)
        return self.post_attention_layernorm_2(self.mlp(x)), residual, h


class LoopedModel(nn.Module):
    """Embeddings, N layers, and the norm that closes every loop."""

    attention: ClassVar[type[MeltAttention] | type[OuroAttention]]

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
        """All layers once: the normed state [tokens, hidden], and what each layer's h has become.

        Args:
            h: [N, tokens, hidden], a MELT's states after the loop before; None at loop 1.
            loop: counted from 1.
        """
        residual = None
        states: list[Tensor | None] = []
        for i, layer in enumerate(self.layers):
            x, residual, state = layer(positions, x, residual, None if h is None else h[i], loop)
            states.append(state)
        x, _ = self.norm(x, residual)
        return x, states


@support_torch_compile
class FirstLoop(nn.Module):
    """A MELT's loop 1, from embeddings."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "MeltModel"):
        super().__init__()
        self.model = (model,)  # in a tuple: its weights are not this module's

    def forward(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the loop, [tokens, hidden], and h of every layer, [N, tokens, hidden]."""
        x, states = self.model[0].run_loop(positions, x, None, positions.new_ones(()))
        return x, torch.stack(states)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "x": 0, "h": 1})
class LaterLoop(nn.Module):
    """A MELT's loop 2 or later. All are the same computation, so they are compiled once."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "MeltModel"):
        super().__init__()
        self.model = (model,)

    def forward(self, positions: Tensor, x: Tensor, h: Tensor, loop: Tensor) -> tuple[Tensor, Tensor]:
        """As `FirstLoop`, from the loop before; h may be overwritten."""
        x, states = self.model[0].run_loop(positions, x, h, loop)
        return x, h if self.model[0].layers[0].self_attn.kv_gate.overwrites else torch.stack(states)


class MeltModel(LoopedModel):
    """A MELT's layers and loops. Tokens that have run all of theirs leave the step: no loop is paid for nothing.

    Attributes:
        token_loops: [tokens], the loops that the tokens of the last step ran.
    """

    attention = MeltAttention

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: MeltConfig = vllm_config.model_config.hf_config
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.default_depth = Depth(config.total_ut_steps, config.early_exit_threshold)
        self.token_loops: Tensor | None = None
        with set_model_tag("first_loop"):
            self.first_loop = FirstLoop(vllm_config=vllm_config, model=self)
        with set_model_tag("later_loop"):
            self.later_loop = LaterLoop(vllm_config=vllm_config, model=self)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
        depths: Sequence[Depth] | None = None,
    ) -> Tensor:
        """The normed state after every token's last loop, [tokens, hidden], for tokens packed as vLLM packs them.

        Args:
            depths: each request's; by default the checkpoint's for all.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if get_forward_context().attn_metadata is None:  # vLLM warms up, or measures memory
            x, h = self.first_loop(positions, x)
            for loop in range(2, self.loops + 1):
                x, h = self.later_loop(positions, x, h, torch.tensor(loop))
            return x
        attention = [layer.self_attn for layer in self.layers]
        final, open_rows = [each.attn for each in attention], attention[0].open_rows
        depths = depths or [self.default_depth] * final[0].step.common.num_reqs
        rows = StepRows(final, open_rows, positions, depths)
        step = StepDepths(depths, rows.requests, self.early_exit_gate)
        adapters = TokenAdapters(self.layers[0].mlp.down_proj)
        finished, h = torch.empty_like(x), None
        with adapters.restored():
            for loop in range(1, rows.deepest + 1):
                with rows.at(loop):
                    if h is None:
                        x, h = self.first_loop(positions, x)
                    else:
                        x, h = self.later_loop(positions, x, h, torch.tensor(loop))
                staying = step.staying(loop, rows.tokens, x)
                if staying is None:
                    continue
                leaving = ~staying
                finished[rows.tokens[leaving]] = x[leaving]
                if open_rows and step.may_exit and loop < rows.deepest:
                    with adapters.only(leaving):
                        self.write_later_rows(*rows.slots_after(loop, leaving), positions[leaving], h[:, leaving])
                if not staying.any():
                    break
                rows.keep(staying)
                adapters.keep(staying)
                positions, x, h = positions[staying], x[staying], h[:, staying]
        self.token_loops = step.ran
        return finished

    def write_later_rows(self, slots: Tensor, rows: Tensor, positions: Tensor, h: Tensor) -> None:
        """Give tokens that exit early a row in the loops they do not run: that of their last.

        Args:
            slots: [W], to write.
            rows: [W], which token's row goes there.
            positions: [L], of the tokens.
            h: [N, L, hidden], their last states.
        """
        for layer, state in zip(self.layers, h, strict=True):
            attention = layer.self_attn
            k, v = attention.project_rows(positions, state)
            cache = attention.attn
            k, v = (each.unflatten(-1, (cache.num_kv_heads, cache.head_size))[rows] for each in (k, v))
            cache.impl.do_kv_cache_update(cache, k, v, cache.kv_cache, slots)


@support_torch_compile
class OuroModel(LoopedModel):
    """A LoopLM's layers and loops."""

    attention = OuroAttention

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The normed state after the last loop, [tokens, hidden], for tokens packed as vLLM packs them."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for loop in range(1, self.loops + 1):
            x, _ = self.run_loop(positions, x, None, loop)
        return x


class LoopedForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """What both architectures share: embeddings and head around the loops, and the loading of weights."""

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
        """[tokens] -> [tokens, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **depths: Sequence[Depth],
    ) -> Tensor:
        """The normed state after the last loop, [tokens, hidden]; a MELT takes its requests' `depths`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, **depths)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[tokens, hidden] -> [tokens, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, as the mapper renames them."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


MLP_WEIGHTS = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}


class MeltForCausalLM(LoopedForCausalLM):
    """The architecture that `melt` checkpoints name: one KV row a (layer, token), whatever the loops."""

    backbone = MeltModel
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".k_proj": (".kv_proj", "k"), ".v_proj": (".kv_proj", "v"), **MLP_WEIGHTS},
    )
    packed_modules_mapping = {"kv_proj": ["k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def get_model_state_cls(self) -> type:
        """vLLM's GPU runner asks for it; a CPU has no use for its imports."""
        from melt_serve.engine.model_state import MeltModelState

        return MeltModelState


class OuroForCausalLM(LoopedForCausalLM):
    """The architecture that `ouro` checkpoints name: a LoopLM, with KV rows of every loop.

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
