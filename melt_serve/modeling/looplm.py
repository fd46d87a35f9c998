"""LoopLM (Ouro) in plain PyTorch: N layers applied T times, one KV cache a (layer, loop).

Source: Scaling Latent Reasoning via Looped Language Models, arXiv 2510.25741; README.md, section 1.
Letters: B sequences, S new tokens, K keys, H heads, D head_dim, V vocabulary, d hidden size, N layers, T loops.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from melt_serve.config import LoopLMConfig
from melt_serve.modeling.contrast import Contrast
from melt_serve.modeling.depth import TokenDepths
from melt_serve.modeling.masks import Spans, attention, spans_of

RotaryTables = tuple[Tensor, Tensor]


@dataclass
class LoopedOutput(ModelOutput):
    """What a looped model answers.

    Attributes:
        loss: next-token cross-entropy of the last loop, where `labels` were given.
        logits: [B, S, V], after the last loop; contrasted, where `contrast` was set.
        loop_logits: [T, B, S, V], the answer at every loop, where `output_loops` was set.
        exit_probabilities: [T, B, S], Ouro's exit gate after every loop, where `output_loops` was set.
        loop_states: [T, B, S, d], the normed state after every loop, which the heads answer from, in place of answers
            where `output_states` was set.
        depths: [B, S], the loops each token ran, 0 for padding.
        past_key_values: the cache, where `use_cache` was set.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loop_logits: Tensor | None = None
    exit_probabilities: Tensor | None = None
    loop_states: Tensor | None = None
    depths: Tensor | None = None
    past_key_values: Cache | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32 or, of float64, in float64."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: [..., d] -> [..., d], in the dtype of x."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LoopLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP: [..., d] -> [..., d]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(config: LoopLMConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTables:
    """Compute the cosines and sines of the rotary embedding.

    Args:
        positions: [B, S], a token's place in its own sequence; padding may hold anything.

    Returns:
        cos, sin: [B, 1, S, D], computed in float32, given in `dtype`; sin is negated in its first half, see `rotate`.
    """
    assert config.head_dim is not None
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None, :, None].float() / config.rope_base**exponents
    return torch.cat((angles, angles), dim=-1).cos().to(dtype), torch.cat((-angles, angles), dim=-1).sin().to(dtype)


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Apply RoPE to queries or keys x: [B, H, S, D], the first half of D paired with the second."""
    cos, sin = tables
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class SelfAttention(nn.Module):
    """The projections and the softmax that LoopLM and MELT share; rows come from the caller."""

    def __init__(self, config: LoopLMConfig):
        super().__init__()
        assert config.num_key_value_heads is not None and config.head_dim is not None
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Split x into heads: [B, S, H * D] -> [B, H, S, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def query(self, n: Tensor, tables: RotaryTables) -> Tensor:
        """Project queries, q = RoPE(W_Q n): [B, S, d] -> [B, H, S, D]."""
        return rotate(self.heads(self.q_proj(n)), tables)

    def rows(self, source: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        """Project rows, k = RoPE(W_K s) and v = W_V s: [B, S, d] -> two of [B, KV heads, S, D]."""
        return rotate(self.heads(self.k_proj(source)), tables), self.heads(self.v_proj(source))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | Spans) -> Tensor:
        """Compute o = W_O attn(q, k, v), as `masks.attention`: [B, S, d]."""
        return self.o_proj(attention(q, k, v, visible).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """One layer with sandwich norms; `attention` is what differs between LoopLM and MELT."""

    def __init__(self, config: LoopLMConfig, attention: SelfAttention):
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def finish(self, x: Tensor, attention_output: Tensor) -> Tensor:
        """Return the residual stream after this layer, given o = W_O attn(...): both [B, S, d]."""
        x = x + self.input_layernorm_2(attention_output)
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class LoopedBackbone(nn.Module):
    """The weights under `model.`: embeddings, N layers, the norm after every loop, the exit gate."""

    def __init__(self, config: LoopLMConfig, attention: type[SelfAttention]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, attention(config)) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    """What LoopLM and MELT share around their loops: weights, the heads, the Hugging Face surface."""

    config: LoopLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ("DecoderLayer",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own name)
    attention: type[SelfAttention] = SelfAttention

    def __init__(self, config: LoopLMConfig):
        super().__init__(config)
        self.model = LoopedBackbone(config, self.attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings (Hugging Face's name for them)."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the vocabulary head (Hugging Face's name for it)."""
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves making the cache to forward

    def exit_probabilities(self, states: Tensor) -> Tensor:
        """Compute lambda, Ouro's exit gate on normed states: [..., d] -> [...]."""
        return torch.sigmoid(self.model.early_exit_gate(states)).squeeze(-1)

    def check_loops(self, loops: int | Tensor | None, batch_size: int) -> tuple[int, Tensor]:
        """Return the most loops that any sequence runs, and each one's, [B].

        Raises:
            ValueError: they are below 1, or above the config's `max_loops`; a LoopLM's need not state any.
        """
        each = torch.as_tensor(self.config.total_ut_steps if loops is None else loops, device=self.device)
        most = self.config.max_loops
        if each.is_floating_point() or (each < 1).any() or (most is not None and (each > most).any()):
            allowed = "at least 1" if most is None else f"from 1 to max_loops={most}"
            raise ValueError(f"loops must be {allowed}, not {each.tolist()}")
        return int(each.max()), each.expand(batch_size)

    def check_threshold(self, threshold: float | Tensor | None, batch_size: int) -> Tensor:
        """Return each sequence's exit threshold, [B].

        Raises:
            ValueError: one is outside (0, 1].
        """
        own = self.config.early_exit_threshold if threshold is None else threshold
        each = torch.as_tensor(own, device=self.device, dtype=torch.float32)
        if (each <= 0).any() or (each > 1).any():
            raise ValueError(f"exit_threshold must be above 0 and at most 1, not {each.tolist()}")
        return each.expand(batch_size)

    def answer(
        self,
        loop_states: list[Tensor],
        labels: Tensor | None,
        output_loops: bool,
        output_states: bool,
        logits_to_keep: int,
        cache: Cache | None,
        contrast: Contrast | None,
    ) -> LoopedOutput:
        """Apply the heads to the states after each loop (T of [B, S, d]), as `LoopedOutput` describes."""
        if output_states:
            return LoopedOutput(loop_states=torch.stack(loop_states), past_key_values=cache)
        states = [x[:, -logits_to_keep:] for x in loop_states] if logits_to_keep else loop_states
        logits = self.lm_head(states[-1] if contrast is None else contrast.combine(states))
        output = LoopedOutput(logits=logits, past_key_values=cache)
        if output_loops:
            stacked = torch.stack(states)
            output.loop_logits = self.lm_head(stacked)
            output.exit_probabilities = self.exit_probabilities(stacked)
        if labels is not None:
            output.loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return output


def new_token_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mark the real tokens among the new ones, [B, S]; `attention_mask` may also cover the past."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask[:, -input_ids.shape[1] :].bool()


class OuroForCausalLM(LoopedForCausalLM):
    """A LoopLM with every (layer, loop) pair's own KV rows."""

    config_class = LoopLMConfig

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        loops: int | Tensor | None = None,
        exit_threshold: float | Tensor | None = None,
        contrast: float | Tensor | None = None,
        contrast_loop: int | Tensor | None = None,
        output_loops: bool = False,
        output_states: bool = False,
        logits_to_keep: int = 0,
        document_starts: Tensor | None = None,
        **_: object,
    ) -> LoopedOutput:
        """Run T loops over the new tokens.

        A token whose last loop is e, because its sequence runs no more or because it exits early, keeps its state x_e,
        which gives its logits at every later loop, and in every layer its normed input n_e: its row of any later loop
        is its row of loop e ("last exited"; README.md, section 4). It is so in prefill and in decoding alike.

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], 0 for padding (left or right).
            past_key_values: the cache of an earlier call, made with the same `loops` and `exit_threshold`. It has rows
                of as many loops as the deepest sequence runs, for all sequences.
            labels: [B, S], -100 where there is nothing to predict.
            loops: T, by default the config's `total_ut_steps`; or [B], each sequence's.
            exit_threshold: in (0, 1], by default the config's; or [B]. Below 1, a token leaves its loops early where
                the exit gate says so.
            contrast: w, from 0, by default no contrast; or [B] (README.md, section 5).
            contrast_loop: k, from 1 to T - 1, by default half of T; or [B].
            output_loops: also give logits and exit probabilities of every loop.
            output_states: give the states after every loop, and no answers.
            logits_to_keep: answer only for this many last tokens (0: all).
            document_starts: [B, S], the column where each token's document begins, in packs (README.md, section 3);
                without a past.

        Raises:
            ValueError: fewer than 1 loop, or more than a `max_loops` of the config; a threshold outside (0, 1]; a
                contrast below 0, or with no loop before the last one.
        """
        loops, each_loops = self.check_loops(loops, len(input_ids))
        thresholds = self.check_threshold(exit_threshold, len(input_ids))
        contrasted = Contrast.of(contrast, contrast_loop, each_loops)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        real = new_token_mask(input_ids, attention_mask)
        if past and attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        keys_real = real if attention_mask is None else attention_mask.bool()
        positions = keys_real.cumsum(-1)[:, past:] - 1
        columns = torch.arange(keys_real.shape[1], device=input_ids.device)
        if document_starts is not None:
            positions = columns - document_starts
        visible: Tensor | Spans | None = None if past else spans_of(real, document_starts)
        if visible is None:
            visible = (columns[None, :] <= columns[past:, None]) & keys_real[:, None]
            if document_starts is not None:
                visible &= columns >= document_starts[:, :, None]
            visible |= ~real[:, :, None]  # padding sees all: its softmax must not be empty
        tables = rotary_tables(self.config, positions, self.dtype)

        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        together = (thresholds == 1).all() and (each_loops == loops).all()  # so nothing is kept, as in training
        depths = None if together else TokenDepths(real, each_loops, thresholds)
        x = self.model.embed_tokens(input_ids)
        kept: list[Tensor | None] = [None] * len(self.model.layers)
        loop_states = []
        for loop in range(1, loops + 1):
            before = x
            for i, layer in enumerate(self.model.layers):
                n = source = layer.input_layernorm(x)
                if depths is not None:
                    source = kept[i] = depths.keep(n, kept[i])
                k, v = layer.self_attn.rows(source, tables)
                if past_key_values is not None:
                    k, v = past_key_values.update(k, v, (loop - 1) * self.config.num_hidden_layers + i)
                x = layer.finish(x, layer.self_attn.attend(layer.self_attn.query(n, tables), k, v, visible))
            x = self.model.norm(x)
            if depths is not None:
                x = depths.keep(x, before)
                depths.after(loop, self.exit_probabilities(x))
            loop_states.append(x)
        output = self.answer(
            loop_states, labels, output_loops, output_states, logits_to_keep, past_key_values, contrasted
        )
        output.depths = real * loops if depths is None else depths.ran
        return output
