"""The KV gate: what a token's latent state h keeps from loop to loop (arXiv 2605.07721; README.md, section 2)."""

import math

import torch
from torch import Tensor, nn

from melt_serve.config import EMA_KEEP, MeltConfig, gate_biases, gate_width

GATE_BIAS = -2.0
"""Where a b_z that all loops share starts (our choice): z is near 0.12, and a fresh MELT close to gate type `last`."""


def fresh_weight_std(config: MeltConfig) -> float:
    """Return the standard deviation that the gate's matrices, or their factors, start at (our choice).

    W_z n and U_z h of unit-RMS inputs are then spread by 0.28 whatever the width: 0.02 at a width of 192.
    """
    whole = 0.02 * math.sqrt(192 / config.hidden_size)
    return math.sqrt(whole / math.sqrt(config.kv_gate_rank)) if config.kv_gate_rank else whole


def running_mean_biases(config: MeltConfig) -> Tensor:
    """Return a b_z for each loop, [loops - 1, width], that makes h_t the mean of n_1..n_t if W_z and U_z are 0.

    Our choice: z = (t - 1) / t, so b_t = log(t - 1). Trained gates were found to end near it.
    """
    previous_loops = torch.arange(1.0, gate_biases(config) + 1)
    return previous_loops.log()[:, None].repeat(1, gate_width(config))


class KVGate(nn.Module):
    """h_t = z_t * h_{t-1} + (1 - z_t) * n_t, with z_t by `kv_gate_type`.

    `elementwise` (the paper's) learns one z a dimension, z_t = sigmoid(W_z n_t + U_z h_{t-1} + b_z);
    `scalar` one z a token by the same formula. With a `kv_gate_rank`, W_z and U_z are products (our
    addition): `_down` from hidden to rank, `_proj` from there to z. With a `kv_gate_bias` a loop, loop t
    from the second on adds its own b_z (our addition). The ablations learn nothing: `mean`
    makes h_t the mean of n_1..n_t, `ema` an exponential moving average, `last` takes h_t = n_t.
    """

    def __init__(self, config: MeltConfig):
        super().__init__()
        self.type = config.kv_gate_type
        self.initial_state = config.kv_gate_initial_state
        self.learned = gate_width(config) > 0
        if width := gate_width(config):
            rank = config.kv_gate_rank
            read = rank or config.hidden_size
            self.input_down = GateProjection(config.hidden_size, rank, bias=False) if rank else nn.Identity()
            shared = config.kv_gate_bias == "shared"
            self.input_proj = GateProjection(read, width, bias=shared)  # W_z, b_z
            self.loop_bias = None if shared else nn.Parameter(running_mean_biases(config))  # b_z of loops 2, 3, ...
            self.state_down = GateProjection(config.hidden_size, rank, bias=False) if rank else nn.Identity()
            self.state_proj = GateProjection(read, width, bias=False)  # U_z

    def forward(self, n: Tensor, h: Tensor | None, loop: int) -> Tensor:
        """Update the latent state in one loop.

        Args:
            n: [..., hidden], the normed attention input of this loop.
            h: [..., hidden], the state after the loop before; None at loop 1.
            loop: t, counted from 1.

        Returns:
            [..., hidden], the state h_t that this loop's K and V rows are projected from.
        """
        if h is None:
            if self.initial_state == "input":
                return n  # h_0 = n_1, so h_1 = n_1 whatever the gate says (our choice)
            h = torch.zeros_like(n)
        z = self.keep(n, h, loop)
        return z * h + (1 - z) * n

    def keep(self, n: Tensor, h: Tensor, loop: int) -> Tensor | float:
        """Compute z, the share of the old state that survives: [..., hidden], [..., 1] or one number."""
        match self.type:
            case "mean":
                return (loop - 1) / loop
            case "ema":
                return EMA_KEEP
            case "last":
                return 0.0
        logits = self.input_proj(self.input_down(n)) + self.state_proj(self.state_down(h))
        return torch.sigmoid(logits if self.loop_bias is None else logits + self.loop_bias[loop - 2])

    def bias(self, loop: int) -> Tensor:
        """Return b_z of a loop, [width]."""
        return self.input_proj.bias if self.loop_bias is None else self.loop_bias[loop - 2]


class GateProjection(nn.Linear):
    """W_z with b_z, U_z, or a factor of one. Its own class, because transformers initialises weights by class."""
