"""LoopLMs in vLLM: the same layers run as often as each token needs, with KV rows of every loop.

Laid beside modeling/looplm.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
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
from melt_serve.engine.contrast import StepContrasts
from melt_serve.engine.exits import ExitReport, StepExits
from melt_serve.engine.graphs import LoopGraphs
from melt_serve.engine.loop_rows import LoopRows, copies_of
from melt_serve.engine.lora import TokenAdapters
from melt_serve.engine.step import Running, StepPlan, StepRows
from melt_serve.engine.weights import WeightChecks
from melt_serve.kernels import norms

RowsT = TypeVar("RowsT", bound=Attention)
MLP_WEIGHTS = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
"""Where a checkpoint's gate and up projections lie in vLLM's stacked layer."""


class OuroAttention(nn.Module):
    """A LoopLM's attention: every loop has rows of its own, which its block table finds; there is no state h."""

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
        self.attn = paged_attention(LoopRows, config, vllm_config, prefix=f"{prefix}.attn")

    def forward(self, positions: Tensor, n: Tensor, h: None, loop: int) -> tuple[Tensor, None]:
        """Return W_O attn(...), [tokens, hidden], and no state; whatever the loop, it is the same computation."""
        qkv, _ = self.qkv_proj(n)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output, None


class LoopedDecoderLayer(nn.Module):
    """A layer with sandwich norms: one closes each block, and the one that opens the next follows at once."""

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
        self, positions: Tensor, n: Tensor, residual: Tensor, before: Any, loop: Tensor | int, following: RMSNorm
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the normed input of what follows the layer, the residual stream, and a MELT's new h.

        Args:
            n: [tokens, hidden], the normed input of the attention.
            residual: [tokens, hidden], the residual stream; it is overwritten.
            before: what the attention takes of the loop before.
            loop: t, counted from 1.
            following: the norm of the next layer's attention, or the one that closes the loop.
        """
        attended, h = self.self_attn(positions, n, before, loop)
        x, residual = norm_add_norm(self.input_layernorm_2, self.post_attention_layernorm, attended, residual)
        n, residual = norm_add_norm(self.post_attention_layernorm_2, following, self.mlp(x), residual)
        return n, residual, h


def norm_add_norm(closing: RMSNorm, opening: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Close a block and open the next: return opening(residual + closing(x)) and that sum, over x and residual.

    One kernel of ours or, where that does not run, two of vLLM's.
    """

    def by_vllm(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return opening(closing(x), residual)

    return norms.norm_add_norm(x, residual, closing.weight, opening.weight, closing.variance_epsilon, otherwise=by_vllm)


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
        self, positions: Tensor, x: Tensor, before: Sequence[Any] | None, loop: Tensor | int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run all layers once; return the normed state, [tokens, hidden], and each layer's new h.

        Args:
            positions: [tokens].
            x: [tokens, hidden]; it is overwritten.
            before: what each layer's attention takes of the loop before; None at loop 1 and for a LoopLM.
            loop: t, counted from 1.
        """
        n, residual = self.layers[0].input_layernorm(x), x
        openings = [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]
        states: list[Tensor | None] = []
        for i, (layer, following) in enumerate(zip(self.layers, openings, strict=True)):
            n, residual, state = layer(positions, n, residual, before and before[i], loop, following)
            states.append(state)
        return n, states


@support_torch_compile
class OneLoop(nn.Module):
    """A loop of a LoopLM, a graph of its own to the compiler. All are the same computation, so it is compiled once."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "OuroModel"):
        super().__init__()
        self.model = (model,)  # in a tuple: its weights are not this module's

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Return the normed state after the loop, [tokens, hidden]; x may be overwritten."""
        x, _ = self.model[0].run_loop(positions, x, None, 1)
        return x


class OuroModel(LoopedModel):
    """The layers of a LoopLM, run as often as each token needs: one that has run all its loops leaves the step."""

    attention = OuroAttention
    graph_kinds = 1

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.early_exit_gate = nn.Linear(vllm_config.model_config.hf_config.hidden_size, 1)
        self.one_loop = OneLoop(vllm_config=vllm_config, model=self)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
        plan: StepPlan | None = None,
        graphs: LoopGraphs | None = None,
    ) -> Tensor:
        """Return the normed state after every token's last loop, [tokens, hidden], for tokens as vLLM packs them.

        Args:
            plan: of the step; there is none while vLLM warms up, or measures memory.
            graphs: replayed where they fit and no token may exit early.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if get_forward_context().attn_metadata is None:
            for _ in range(self.loops):
                x = self.one_loop(positions, x)
            return x
        assert plan is not None
        rows = StepRows([layer.self_attn.attn for layer in self.layers], None, plan, positions)
        running, arranged = Running.all_of(plan, rows, positions)
        exits = StepExits(plan, x.device, self.early_exit_gate)
        contrasts, report = StepContrasts(plan), ExitReport(plan, x.device, self.early_exit_gate)
        adapters = TokenAdapters(self.layers[0].mlp.down_proj)
        x, finished = x[arranged], None
        with adapters.restored():
            if plan.moved:
                adapters.keep(arranged)
            for loop in range(1, plan.deepest + 1):
                copies = copies_of(loop, plan, running)
                if graphs is not None and copies is None and graphs.fit(running):
                    x, _ = graphs.replay(loop, running, x, None)
                else:
                    with running.select_loop(loop, copies):
                        x = self.one_loop(running.positions, x)
                contrasts.keep(loop, running, x)
                report.note(loop, running, x)
                following, staying = running.after(loop, plan, exits.decide(loop, running.sequences, x))
                if following is running:
                    continue
                if following is None and finished is None and isinstance(running.tokens, slice):
                    finished = x  # all tokens ran as many loops, in the order they came
                    break
                finished = torch.empty_like(x) if finished is None else finished
                finished[running.tokens] = x
                if following is None:
                    break
                adapters.keep(staying)
                exits.keep(staying)
                running, x = following, x[staying]
        report.close()
        return contrasts.apply(finished)

    def run_captured(
        self, kind: int, loop: Tensor, positions: Tensor, x: Tensor, h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run a loop as a CUDA graph has it: whatever the loop, it is the same computation. There is no h."""
        return self.one_loop(positions, x), x.new_empty(0, len(x))


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
        self.quantized = vllm_config.quant_config is not None
        # Later loads may be parts: a trainer that sends new weights to a live engine, which may have begun with none.
        self.loads_whole = vllm_config.load_config.load_format != "dummy"

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
        """Return the normed state after every token's last loop, [tokens, hidden]; `of_step` is the step's plan."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, **of_step)

    def get_model_state_cls(self) -> type:
        """Return the class that vLLM's GPU runner asks for; a CPU has no use for its imports."""
        from melt_serve.engine.gpu_model_state import MeltModelState

        return MeltModelState

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Map [tokens, hidden] to logits, [tokens, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, as the mapper renames them.

        Raises:
            ValueError: one is not what it must be, or the first load of a checkpoint lacks one; see `WeightChecks`.
        """
        checks = WeightChecks(self.config, self.quantized)
        loaded = AutoWeightsLoader(self).load_weights(checks.watch(weights), mapper=self.hf_to_vllm_mapper)
        if self.loads_whole:
            checks.refuse_missing()
            self.loads_whole = False
        return loaded


class OuroForCausalLM(LoopedForCausalLM):
    """The architecture of `ouro` checkpoints: a LoopLM, with KV rows of every loop. vLLM itself had one up to 0.25."""

    backbone = OuroModel
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            **MLP_WEIGHTS,
        },
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
