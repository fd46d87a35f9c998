"""MELTs in vLLM: one KV row a layer and token, rewritten by every loop. Laid beside modeling/melt.py."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import WeightsMapper
from vllm.sequence import IntermediateTensors

from melt_serve.config import MeltConfig
from melt_serve.engine.attention import FinalRows, OpenRows
from melt_serve.engine.contrast import StepContrasts
from melt_serve.engine.exits import ExitReport, StepExits
from melt_serve.engine.gate import KVGate
from melt_serve.engine.graphs import LoopGraphs
from melt_serve.engine.looplm import (
    MLP_WEIGHTS,
    LoopedForCausalLM,
    LoopedModel,
    local_kv_heads,
    paged_attention,
    rotary_embedding,
)
from melt_serve.engine.lora import TokenAdapters
from melt_serve.engine.merge import may_merge, merge
from melt_serve.engine.step import Running, StepPlan, StepRows, to_device

ALIGNED = 8
"""Queries begin at multiples of so many values: 16 bytes, of two bytes each."""


class MeltAttention(nn.Module):
    """Attention whose queries come from n, and K and V rows from the gated state h.

    The cache keeps the row of the last loop: in `token` mode every loop writes the same slots again. In `chunk`
    mode the loops before a request's last write other slots, which are freed when their chunk closes.
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
        self.merged_input: Tensor | None
        self.register_buffer("merged_input", None, persistent=False)
        self.rotary_emb = rotary_embedding(config)
        # Final rows first: their cache group and its tables come before those that are laid over them.
        self.attn = paged_attention(FinalRows, config, vllm_config, prefix=f"{prefix}.attn")
        assert config.max_loops is not None
        self.open_rows: OpenRows | None = None
        if config.decode_mode == "chunk" and config.max_loops > 1:
            # vLLM reads a layer's number off its name: this is of no layer that there is.
            other = prefix.replace(f".{layer}.", f".{config.num_hidden_layers + layer}.")
            self.open_rows = paged_attention(OpenRows, config, vllm_config, prefix=f"{other}.attn")

    def forward(
        self, positions: Tensor, n: Tensor, before: tuple[Tensor, Tensor | None] | None, loop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return W_O attn(...) and the new state h, both [tokens, hidden].

        Args:
            positions: [tokens].
            n: [tokens, hidden], the normed input.
            before: h of the loop before, and what the gate's U_z makes of it if that is computed; None at loop 1.
            loop: t, counted from 1.
        """
        h, from_state = before or (None, None)
        if self.merged_input is None or h is None:
            q, _ = self.q_proj(n)
            h = self.kv_gate(n, h, loop, from_state=from_state)
        else:
            q_size = self.q_proj.output_size_per_partition
            q, from_input = F.linear(n, self.merged_input).tensor_split([q_size], dim=-1)
            h = self.kv_gate(n, h, loop, from_input, from_state)
        kv, _ = self.kv_proj(h)
        k, v = kv.split([self.kv_size, self.kv_size], dim=-1)
        output, _ = self.o_proj(self.attn.rotate_and_attend(positions, q, k, v, self.rotary_emb))
        return output, h

    def project_rows(self, positions: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V rows of state h, [tokens, KV heads * head_dim] each, as `forward` writes them."""
        kv, _ = self.kv_proj(h)
        k, v = kv.split([self.kv_size, self.kv_size], dim=-1)
        k, _ = self.rotary_emb(positions, k.contiguous())
        return k, v


@support_torch_compile
class FirstLoop(nn.Module):
    """Loop 1 of a MELT, from embeddings: a graph of its own to the compiler."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "MeltModel"):
        super().__init__()
        self.model = (model,)  # in a tuple: its weights are not this module's

    def forward(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after the loop, [tokens, hidden], and h of every layer, [N, tokens, hidden]."""
        x, states = self.model[0].run_loop(positions, x, None, positions.new_ones(()))
        return x, torch.stack(states)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "x": 0, "h": 1})
class LaterLoop(nn.Module):
    """Loop 2 or later of a MELT. All are the same computation, so they are compiled once."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "MeltModel"):
        super().__init__()
        self.model = (model,)

    def forward(self, positions: Tensor, x: Tensor, h: Tensor, loop: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `FirstLoop` does, from the loop before; h may be overwritten."""
        x, states = self.model[0].run_loop(positions, x, self.model[0].before_loop(h), loop)
        return x, h if self.model[0].layers[0].self_attn.kv_gate.overwrites else torch.stack(states)


class MeltModel(LoopedModel):
    """The layers of a MELT, run as often as each token needs: one that has run all its loops leaves the step."""

    attention = MeltAttention
    graph_kinds = 2

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: MeltConfig = vllm_config.model_config.hf_config
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.merged_state: Tensor | None
        self.register_buffer("merged_state", None, persistent=False)
        if may_merge(vllm_config):
            self.layers[-1].self_attn.attn.when_loaded = self.merge_weights
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
        plan: StepPlan | None = None,
        graphs: LoopGraphs | None = None,
    ) -> Tensor:
        """Return the normed state after every token's last loop, [tokens, hidden], for tokens as vLLM packs them.

        Args:
            plan: of the step; there is none while vLLM warms up, or measures memory.
            graphs: replayed where they fit.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if get_forward_context().attn_metadata is None:
            h = None
            for loop in range(1, self.loops + 1):
                x, h = self.run(positions.new_full((), loop), positions, x, h)
            return x
        assert plan is not None
        attention = [layer.self_attn for layer in self.layers]
        open_rows = attention[0].open_rows
        rows = StepRows([each.attn for each in attention], open_rows, plan, positions)
        running, arranged = Running.all_of(plan, rows, positions)
        exits = StepExits(plan, x.device, self.early_exit_gate)
        contrasts, report = StepContrasts(plan), ExitReport(plan, x.device, self.early_exit_gate)
        adapters = TokenAdapters(self.layers[0].mlp.down_proj)
        x, h, finished = x[arranged], None, None
        with adapters.restored():
            if plan.moved:
                adapters.keep(arranged)
            for loop in range(1, plan.deepest + 1):
                if graphs is not None and graphs.fit(running):
                    x, h = graphs.replay(loop, running, x, h)
                else:
                    with running.select_loop(loop):
                        x, h = self.run(positions.new_full((), loop), running.positions, x, h)
                contrasts.keep(loop, running, x)
                report.note(loop, running, x)
                exited = exits.decide(loop, running.sequences, x)
                following, staying = running.after(loop, plan, exited)
                if following is running:
                    continue
                if open_rows is not None and exited.any():
                    self.write_later_rows(running, loop, np.flatnonzero(exited), h, adapters)
                if following is None and finished is None and isinstance(running.tokens, slice):
                    finished = x  # all tokens ran as many loops, in the order they came
                    break
                finished = torch.empty_like(x) if finished is None else finished
                finished[running.tokens] = x
                if following is None:
                    break
                adapters.keep(staying)
                exits.keep(staying)
                running, x, h = following, x[staying], h[:, staying]
        report.close()
        return contrasts.apply(finished)

    def merge_weights(self) -> None:
        """Let one matmul do the work of several that wait for the same tensor, where weights lie as they were loaded.

        W_Q and W_z of a layer both read n. U_z of all layers reads h of the loop before, which is whole when a loop
        begins: one batched matmul a loop instead of one a layer. No weight is there twice.
        """
        attention = [layer.self_attn for layer in self.layers]
        merged_already = self.merged_state is not None or any(each.merged_input is not None for each in attention)
        if not attention[0].kv_gate.learned or merged_already:  # they are loaded once more, to where they were
            return
        for each in attention:
            # One gate value beside a token's queries would leave them unaligned, which GPU kernels do not take.
            if each.kv_gate.reads_input.output_size % ALIGNED == 0:
                each.merged_input = merge(each.q_proj, each.kv_gate.reads_input)
        merged = merge(*(each.kv_gate.reads_state for each in attention))
        self.merged_state = None if merged is None else merged.unflatten(0, (len(attention), -1))

    def before_loop(self, h: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return what each layer takes of the loop before: its h, and what its U_z makes of that if it is merged.

        Args:
            h: [N, tokens, hidden].
        """
        if self.merged_state is None:
            return [(state, None) for state in h]
        return list(zip(h, torch.bmm(h, self.merged_state.mT), strict=True))

    def run(self, loop: Tensor, positions: Tensor, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run all layers once, in the forward context's tables; h is None at loop 1."""
        if h is None:
            return self.first_loop(positions, x)
        # What is compiled takes h as it was when it was compiled.
        return self.later_loop(positions, x, h if self.later_loop.do_not_compile else h.contiguous(), loop)

    def run_captured(
        self, kind: int, loop: Tensor, positions: Tensor, x: Tensor, h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run a loop as a CUDA graph has it: kind 1 is loop 1, which has no h, and kind 2 any later loop."""
        return self.run(loop, positions, x, h)

    def write_later_rows(
        self, running: Running, loop: int, exited: np.ndarray, h: Tensor, adapters: TokenAdapters
    ) -> None:
        """Write the rows of tokens that exit early to the loops they do not run, too.

        Args:
            running: the A tokens that ran the loop.
            exited: [L], those that exit after it.
            h: [N, A, hidden], the states after it.
        """
        (leaving,) = to_device(h.device, exited)
        positions, slots = running.positions[leaving], running.slots_after(loop, leaving)
        with adapters.selected(leaving):
            for layer, state in zip(self.layers, h[:, leaving], strict=True):
                attention = layer.self_attn
                cache = attention.attn
                rows = attention.project_rows(positions, state)
                k, v = (row.unflatten(-1, (cache.num_kv_heads, cache.head_size)) for row in rows)
                k, v = (row.repeat(len(slots), 1, 1) for row in (k, v))
                cache.impl.do_kv_cache_update(cache, k, v, cache.kv_cache, slots.flatten())


class MeltForCausalLM(LoopedForCausalLM):
    """The architecture of `melt` checkpoints: one KV row a (layer, token), whatever the loops."""

    backbone = MeltModel
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".k_proj": (".kv_proj", "k"), ".v_proj": (".kv_proj", "v"), **MLP_WEIGHTS},
    )
    packed_modules_mapping = {"kv_proj": ["k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012
