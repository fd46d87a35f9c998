"""MELT in plain PyTorch: one KV row a (layer, token), rewritten at every loop through a gate.

Source: Memory-Efficient Looped Transformer, arXiv 2605.07721; README.md, sections 2 and 3. Letters as in `looplm.py`,
and n: normed attention input, h: latent state, C: chunk size, Q: tokens of a chunk.
"""

import torch
from torch import Tensor
from transformers.initialization import constant_, normal_

from melt_serve.config import MeltConfig
from melt_serve.modeling.gate import GATE_BIAS, GATE_WEIGHT_STD, GateProjection, KVGate
from melt_serve.modeling.looplm import (
    LoopedForCausalLM,
    LoopedOutput,
    SelfAttention,
    new_token_mask,
    rotary_tables,
)
from melt_serve.modeling.rows import Chunk, MeltRows, cut


class MeltAttention(SelfAttention):
    """Queries from the current input n, K and V rows from the gated state h."""

    def __init__(self, config: MeltConfig):
        super().__init__(config)
        self.kv_gate = KVGate(config)


class MeltForCausalLM(LoopedForCausalLM):
    """A MELT model, chunk by chunk (`forward`, `generate`) or exactly (`token_sequential`)."""

    config_class = MeltConfig
    config: MeltConfig
    attention = MeltAttention

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GateProjection):
            normal_(module.weight, std=GATE_WEIGHT_STD)
            if module.bias is not None:
                constant_(module.bias, GATE_BIAS)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MeltRows | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        loops: int | None = None,
        prompt_lengths: Tensor | None = None,
        output_loops: bool = False,
        logits_to_keep: int = 0,
        **_: object,
    ) -> LoopedOutput:
        """Run the chunks of the new tokens one after another, each through T loops.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S] or [B, past + S], 0 for padding (left or right), which does not
                count for the chunk grid.
            past_key_values: the rows of an earlier call. In `token` mode a call with several tokens is
                (a piece of) the prompt and must begin on the grid; one token is a chunk of its own.
            labels: [B, S], -100 where there is nothing to predict.
            loops: T from 1 to `max_loops`, by default the config's `total_ut_steps`.
            prompt_lengths: [B], `token` mode: tokens from these positions on are chunks of their own,
                as they are when generated.
            output_loops: also give logits and exit probabilities of every loop.
            logits_to_keep: answer only for this many last tokens (0: all).

        Raises:
            ValueError: loops outside 1..max_loops, or a prompt piece that begins inside a chunk.
        """
        loops = self.check_loops(loops)
        real = new_token_mask(input_ids, attention_mask)
        rows = MeltRows(self.config, len(input_ids), input_ids.device) if past_key_values is None else past_key_values
        embeddings = self.model.embed_tokens(input_ids)

        done = 0
        place = torch.zeros_like(input_ids)  # where a token's state will lie once the chunks are joined
        states_by_chunk = []
        for chunk in cut(real, rows.lengths, self.config, prompt_lengths):
            x = embeddings.gather(1, chunk.columns[:, :, None].expand(-1, -1, embeddings.shape[-1]))
            states_by_chunk.append(self.run_chunk(x, chunk, rows, loops))
            place = torch.where(chunk.members, done + chunk.members.cumsum(-1) - 1, place)
            done += x.shape[1]
        states = [torch.cat(parts, dim=1) for parts in zip(*states_by_chunk, strict=True)]
        states = [x.gather(1, place[:, :, None].expand(-1, -1, x.shape[-1])) for x in states]
        return self.answer(states, labels, output_loops, logits_to_keep, rows if use_cache else None)

    def run_chunk(self, x: Tensor, chunk: Chunk, rows: MeltRows, loops: int) -> list[Tensor]:
        """T loops over one chunk; writes its rows.

        Args:
            x: [B, Q, d], the chunk's embeddings.

        Returns:
            The states after each loop: T of [B, Q, d].
        """
        tables = rotary_tables(self.config, chunk.positions, x.dtype)
        before_last, at_last = rows.begin(chunk, loops)
        h: list[Tensor | None] = [None] * len(self.model.layers)
        states = []
        for loop in range(1, loops + 1):
            for i, layer in enumerate(self.model.layers):
                n = layer.input_layernorm(x)
                h[i] = layer.self_attn.kv_gate(n, h[i], loop)
                q = layer.self_attn.query(n, tables)
                k, v = rows.write(i, loop, *layer.self_attn.rows(h[i], tables))
                x = layer.finish(x, layer.self_attn.attend(q, k, v, at_last if loop == loops else before_last))
            x = self.model.norm(x)
            states.append(x)
        rows.finish(chunk)
        return states

    def token_sequential(self, input_ids: Tensor, loops: int | None = None) -> Tensor:
        """The exact model: a token starts loop 1 when every token before it has finished loop T.

        Design section 2 word for word, with no chunk and no mask, to hold `forward` against.

        Args:
            input_ids: [S], one sequence.

        Returns:
            [S, V], the logits after the last loop.
        """
        loops = self.check_loops(loops)
        past: list[tuple[Tensor, Tensor]] = []
        logits = []
        for position, token in enumerate(input_ids):
            tables = rotary_tables(self.config, input_ids.new_full((1, 1), position), self.dtype)
            x = self.model.embed_tokens(token).view(1, 1, -1)
            h: list[Tensor | None] = [None] * len(self.model.layers)
            present: list[tuple[Tensor, Tensor]] = []
            for loop in range(1, loops + 1):
                present = []
                for i, layer in enumerate(self.model.layers):
                    n = layer.input_layernorm(x)
                    h[i] = layer.self_attn.kv_gate(n, h[i], loop)
                    k, v = layer.self_attn.rows(h[i], tables)
                    if past:
                        k, v = torch.cat((past[i][0], k), dim=2), torch.cat((past[i][1], v), dim=2)
                    present.append((k, v))
                    everything = torch.ones(1, 1, position + 1, dtype=torch.bool, device=x.device)
                    x = layer.finish(x, layer.self_attn.attend(layer.self_attn.query(n, tables), k, v, everything))
                x = self.model.norm(x)
            past = present
            logits.append(self.lm_head(x[0, 0]))
        return torch.stack(logits)

    def check_loops(self, loops: int | None) -> int:
        """The loops to run, or a ValueError that names the range."""
        loops = self.config.total_ut_steps if loops is None else loops
        assert self.config.max_loops is not None
        if not 1 <= loops <= self.config.max_loops:
            raise ValueError(f"loops must be from 1 to max_loops={self.config.max_loops}, not {loops}")
        return loops
