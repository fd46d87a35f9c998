"""MELT in plain PyTorch: one KV row a (layer, token), rewritten at every loop through a gate.

Source: Memory-Efficient Looped Transformer, arXiv 2605.07721; README.md, sections 2 and 3. Letters as in `looplm.py`,
and n: normed attention input, h: latent state, C: chunk size, Q: tokens of a chunk.
"""

from copy import copy

import torch
from torch import Tensor
from transformers.initialization import constant_, copy_, normal_

from melt_serve.config import MeltConfig
from melt_serve.modeling.chunks import Chunk, cut, cut_packs
from melt_serve.modeling.contrast import Contrast
from melt_serve.modeling.depth import TokenDepths
from melt_serve.modeling.gate import GATE_BIAS, GateProjection, KVGate, fresh_weight_std, running_mean_biases
from melt_serve.modeling.looplm import (
    LoopedForCausalLM,
    LoopedOutput,
    SelfAttention,
    new_token_mask,
    rotary_tables,
)
from melt_serve.modeling.masks import additive_mask, lower_right
from melt_serve.modeling.rows import MeltRows


class MeltAttention(SelfAttention):
    """Queries from the current input n, K and V rows from the gated state h."""

    gate: type[KVGate] = KVGate

    def __init__(self, config: MeltConfig):
        super().__init__(config)
        self.kv_gate = self.gate(config)


class MeltForCausalLM(LoopedForCausalLM):
    """A MELT model, chunk by chunk (`forward`, `generate`) or exactly (`token_sequential`)."""

    config_class = MeltConfig
    config: MeltConfig
    attention = MeltAttention

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GateProjection):
            normal_(module.weight, std=fresh_weight_std(self.config))
            if module.bias is not None:
                constant_(module.bias, GATE_BIAS)
        if isinstance(module, KVGate) and module.learned and module.loop_bias is not None:
            copy_(module.loop_bias, running_mean_biases(self.config))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MeltRows | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        loops: int | Tensor | None = None,
        exit_threshold: float | Tensor | None = None,
        contrast: float | Tensor | None = None,
        contrast_loop: int | Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        output_loops: bool = False,
        output_states: bool = False,
        logits_to_keep: int = 0,
        document_starts: Tensor | None = None,
        generated: Tensor | None = None,
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
            loops: T from 1 to `max_loops`, by default the config's `total_ut_steps`; or [B], each sequence's.
            exit_threshold: in (0, 1], by default the config's; or [B]. Below 1, a token leaves its loops early where
                the exit gate says so (README.md, section 4).
            contrast: w, from 0, by default no contrast; or [B] (README.md, section 5).
            contrast_loop: k, from 1 to T - 1, by default half of T; or [B].
            prompt_lengths: [B], `token` mode: tokens from these positions on are chunks of their own,
                as they are when generated.
            output_loops: also give logits and exit probabilities of every loop.
            output_states: give the states after every loop, and no answers.
            logits_to_keep: answer only for this many last tokens (0: all).
            document_starts: [B, S], the column where each token's document begins, in packs (README.md, section 3);
                without a past and `prompt_lengths`.
            generated: [B, S], `token` mode: true for tokens that run nearly as they are when generated, all those of a
                chunk at once, in two passes (README.md, section 3); without `prompt_lengths`.

        Raises:
            ValueError: loops outside 1..max_loops, a threshold outside (0, 1], a contrast below 0 or with no loop
                before the last one, a prompt piece that begins inside a chunk; a pack with a past or `prompt_lengths`,
                or whose documents begin off the grid; two passes in `chunk` mode, or with `prompt_lengths`.
        """
        loops, each_loops = self.check_loops(loops, len(input_ids))
        thresholds = self.check_threshold(exit_threshold, len(input_ids))
        contrasted = Contrast.of(contrast, contrast_loop, each_loops)
        together = bool((thresholds == 1).all() and (each_loops == loops).all())
        real = new_token_mask(input_ids, attention_mask)
        rows = MeltRows(self.config, len(input_ids), input_ids.device) if past_key_values is None else past_key_values
        embeddings = self.model.embed_tokens(input_ids)

        if generated is not None and (self.config.decode_mode == "chunk" or prompt_lengths is not None):
            raise ValueError("two passes (generated) stand for token mode's own decoding, and for prompt_lengths")
        if document_starts is None:
            chunks = cut(real, rows.lengths, rows.chunk_size, self.config.decode_mode, prompt_lengths)
        elif prompt_lengths is not None or rows.lengths.any():
            raise ValueError("packs run in one call and on the grid: without a past, and without prompt_lengths")
        else:
            chunks = cut_packs(real, document_starts, rows.chunk_size)
        done = 0
        place = torch.zeros_like(input_ids)  # where a token's state will lie once the chunks are joined
        states_by_chunk, depths_by_chunk = [], []
        for chunk in chunks:
            x = embeddings.gather(1, chunk.columns[:, :, None].expand(-1, -1, embeddings.shape[-1]))
            depths = TokenDepths(chunk.positions >= 0, each_loops, thresholds, together)
            again = None if generated is None else generated.gather(1, chunk.columns) & (chunk.positions >= 0)
            states_by_chunk.append(self.run_chunk(x, chunk, rows, loops, depths, again))
            depths_by_chunk.append(depths.ran)
            place = torch.where(chunk.members, done + chunk.members.cumsum(-1) - 1, place)
            done += x.shape[1]
        states = [torch.cat(parts, dim=1) for parts in zip(*states_by_chunk, strict=True)]
        states = [x.gather(1, place[:, :, None].expand(-1, -1, x.shape[-1])) for x in states]
        cache = rows if use_cache else None
        output = self.answer(states, labels, output_loops, output_states, logits_to_keep, cache, contrasted)
        output.depths = real * loops if together else torch.cat(depths_by_chunk, dim=1).gather(1, place) * real
        return output

    def run_chunk(
        self,
        x: Tensor,
        chunk: Chunk,
        rows: MeltRows,
        loops: int,
        depths: TokenDepths,
        generated: Tensor | None = None,
    ) -> list[Tensor]:
        """Run T loops over one chunk and write its rows; twice where tokens of it are to run as generated ones.

        Args:
            x: [B, Q, d], the chunk's embeddings.
            loops: T, the most that any sequence runs.
            generated: [B, Q], the tokens that see the final rows of a first pass in a second.

        Returns:
            The states after each loop: T of [B, Q, d].
        """
        visible = rows.begin(chunk, loops)
        if generated is not None and generated.any():
            self.run_loops(x, chunk, rows, loops, copy(depths), visible)
            again = rows.begin_again(chunk, generated)
            states = self.run_loops(x, chunk, rows, loops, depths, (again, again))
            rows.forget_first_pass(chunk)
        else:
            states = self.run_loops(x, chunk, rows, loops, depths, visible)
        rows.finish(chunk)
        return states

    def run_loops(
        self,
        x: Tensor,
        chunk: Chunk,
        rows: MeltRows,
        loops: int,
        depths: TokenDepths,
        visible: tuple[Tensor, Tensor] | None,
    ) -> list[Tensor]:
        """Run T loops over one chunk, whose rows there is room for.

        A token that has left keeps its state and its h; so it keeps its rows, too, which are a function of h.

        Args:
            x: [B, Q, d], the chunk's embeddings.
            visible: see `MeltRows.begin`.

        Returns:
            The states after each loop: T of [B, Q, d].
        """
        tables = rotary_tables(self.config, chunk.positions, x.dtype)
        if visible is None:
            before_last = at_last = lower_right(x.shape[1], rows.final_positions.shape[1], x)
        else:
            before_last, at_last = (additive_mask(seen, x.dtype) for seen in visible)
        h: list[Tensor | None] = [None] * len(self.model.layers)
        states = []
        for loop in range(1, loops + 1):
            rows.begin_loop(chunk, depths)
            before = x
            for i, layer in enumerate(self.model.layers):
                attention = layer.self_attn
                n = layer.input_layernorm(x)
                h[i] = depths.keep(attention.kv_gate(n, h[i], loop), h[i])
                k, v = rows.write(i, loop, attention, n, h[i], tables)
                o = attention.attend(attention.query(n, tables), k, v, at_last if loop == loops else before_last)
                rows.observe(i, loop, chunk, o)
                x = layer.finish(x, o)
            x = depths.keep(self.model.norm(x), before)
            states.append(x)
            if not depths.together:
                depths.after(loop, self.exit_probabilities(x))
        return states

    def token_sequential(
        self, input_ids: Tensor, loops: int | None = None, exit_threshold: float | None = None
    ) -> Tensor:
        """Run the exact model: a token starts loop 1 when every token before it has finished loop T.

        It is README.md, section 2, word for word, with no chunk and no mask: what tests compare `forward` with.

        Args:
            input_ids: [S], one sequence.

        Returns:
            [S, V], the logits after the last loop.
        """
        loops, _ = self.check_loops(loops, 1)
        threshold = self.check_threshold(exit_threshold, 1).item()
        past: list[tuple[Tensor, Tensor]] = []
        logits = []
        for position, token in enumerate(input_ids):
            tables = rotary_tables(self.config, input_ids.new_full((1, 1), position), self.dtype)
            x = self.model.embed_tokens(token).view(1, 1, -1)
            h: list[Tensor | None] = [None] * len(self.model.layers)
            present: list[tuple[Tensor, Tensor]] = []
            remaining = 1.0
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
                remaining *= 1 - self.exit_probabilities(x).item()
                if threshold < 1 and 1 - remaining >= threshold:
                    break
            past = present
            logits.append(self.lm_head(x[0, 0]))
        return torch.stack(logits)
