"""The KV gate from vLLM's own linear layers. Letters as in modeling/README.md."""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from melt_serve.config import EMA_KEEP, MeltConfig, gate_biases, gate_width
from melt_serve.kernels.gate import gate_blend


class KVGate(nn.Module):
    """h_t = z_t * h_{t-1} + (1 - z_t) * n_t, with z_t by `kv_gate_type` (arXiv 2605.07721; modeling/README.md).

    Every rank of a tensor-parallel group computes the whole gate: K and V read all of h, and the
    alternative, a gate split over ranks, would gather h N x T times a step.
    """

    def __init__(self, config: MeltConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.type = config.kv_gate_type
        self.initial_state = config.kv_gate_initial_state
        self.learned = gate_width(config) > 0
        if width := gate_width(config):
            quant = vllm_config.quant_config
            shared = config.kv_gate_bias == "shared"
            self.input_down, self.input_proj = gate_projection(config, width, shared, quant, f"{prefix}.input")
            self.loop_bias = None  # b_z of loops 2, 3, ...
            if not shared:
                self.loop_bias = nn.Parameter(torch.empty(gate_biases(config), width), requires_grad=False)
            self.state_down, self.state_proj = gate_projection(config, width, False, quant, f"{prefix}.state")

    def forward(
        self,
        n: Tensor,
        h: Tensor | None,
        loop: Tensor,
        from_input: Tensor | None = None,
        from_state: Tensor | None = None,
    ) -> Tensor:
        """Return the state h_t, [tokens, hidden]. A learned gate, outside of `torch.compile`, writes it over h.

        Args:
            n: [tokens, hidden], the normed input of the layer's attention.
            h: [tokens, hidden], h_{t-1}; None at loop 1.
            loop: t, counted from 1.
            from_input: what `reads_input` makes of n, where that is computed already.
            from_state: what `reads_state` makes of h, likewise.
        """
        if h is None:
            if self.initial_state == "input" or self.type == "last":
                return n
            h = torch.zeros_like(n)
        match self.type:
            case "last":
                return n
            case "mean":
                return torch.lerp(n.float(), h.float(), (loop - 1) / loop).to(n.dtype)
            case "ema":
                return torch.lerp(n, h, EMA_KEEP)
        if from_input is None:
            from_input, _ = self.reads_input(n)
        if from_state is None:
            from_state, _ = self.reads_state(h)
        if self.input_down is not None:
            from_input, _ = self.input_proj(from_input)
            from_state, _ = self.state_proj(from_state)
        return gate_blend(from_input, from_state, self.bias(loop), h, n, out=h if self.overwrites else None)

    def bias(self, loop: Tensor) -> Tensor:
        """Return b_z of a loop, [width], without waiting for the device to tell which one it is."""
        if self.loop_bias is None:
            return self.input_proj.bias
        return self.loop_bias.index_select(0, (loop - 2).view(1)).squeeze(0)

    @property
    def reads_input(self) -> ReplicatedLinear:
        """W_z, or its factor that reads n."""
        return self.input_down or self.input_proj

    @property
    def reads_state(self) -> ReplicatedLinear:
        """U_z, or its factor that reads h."""
        return self.state_down or self.state_proj

    @property
    def overwrites(self) -> bool:
        """Whether h_t takes the place of h_{t-1}. A compiler does that by itself, better if we do not."""
        return self.learned and not torch.compiler.is_compiling()


def gate_projection(
    config: MeltConfig, width: int, bias: bool, quant: QuantizationConfig | None, prefix: str
) -> tuple[ReplicatedLinear | None, ReplicatedLinear]:
    """Make W_z with b_z, or U_z: the factor that reads d, if the gate has a rank, and the factor that gives z."""
    read = config.hidden_size
    down = None
    if config.kv_gate_rank:
        read = config.kv_gate_rank
        down = ReplicatedLinear(config.hidden_size, read, bias=False, quant_config=quant, prefix=f"{prefix}_down")
    # vLLM 0.32's packed CPU matmul reads garbage for its bias under torch.compile: we add b_z ourselves.
    proj = ReplicatedLinear(read, width, bias=bias, skip_bias_add=bias, quant_config=quant, prefix=f"{prefix}_proj")
    return down, proj
