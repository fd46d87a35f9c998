"""Cheaper KV gates, for the study `gates` only: what can be left out of W_z and U_z (docs/studies.md).

Each computes h_t = z_t * h_{t-1} + (1 - z_t) * n_t as the element-wise gate does, and differs in z. Letters as in
`melt_serve.modeling.gate`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from melt_serve.config import MeltConfig
from melt_serve.modeling.gate import GATE_BIAS, KVGate, fresh_weight_std
from melt_serve.train.distil.gate_rank import nearest_factors


@dataclass(frozen=True)
class CheapGate:
    """What is left out of the element-wise gate.

    Attributes:
        rank: W_z and U_z are products of [d, rank] and [rank, d]; 0 leaves z = sigmoid(b_z), d learned constants.
        blocks: W_z and U_z are block-diagonal, of so many square blocks; d of them make z's dimensions independent.
        shared: z is computed at loop 2 and used again in the first half of the loops that have a gate, which are loops
            2..T. T is the config's `total_ut_steps`: of T = 4, loop 3 uses the z of loop 2; of T = 8, loops 3 to 5 do.
    """

    rank: int | None = None
    blocks: int = 1
    shared: bool = False

    def build(self, config: MeltConfig) -> KVGate:
        """Build a fresh gate; the product of factors starts as W_z and U_z do."""
        gate = LoopSharedGate(config) if self.shared else KVGate(config)
        gate.input_proj = self.projection(config, bias=config.kv_gate_bias == "shared")
        gate.state_proj = self.projection(config, bias=False)
        return gate

    def approximate(self, trained: KVGate, config: MeltConfig) -> KVGate:
        """Build the gate of this kind that is nearest to a trained element-wise one, matrix by matrix."""
        gate = self.build(config)
        gate.input_proj.approximate(trained.input_proj)
        gate.state_proj.approximate(trained.state_proj)
        gate.loop_bias = trained.loop_bias
        return gate

    def multiply_adds(self, size: int, loops: int) -> int:
        """Count what z costs a token over T = `loops`: those of the matrices, in every loop that computes a z."""
        matrix = 2 * size * self.rank if self.rank is not None else size * size // self.blocks
        computing = loops - 1 - (max(0, last_sharing(loops) - 2) if self.shared else 0)
        return 2 * matrix * computing

    def projection(self, config: MeltConfig, bias: bool) -> "LowRank | BlockDiagonal":
        """Build what stands for W_z, with the b_z that loops share if they do, or for U_z."""
        return LowRank(config, self.rank, bias) if self.rank is not None else BlockDiagonal(config, self.blocks, bias)


class LoopSharedGate(KVGate):
    """A gate whose loops up to `last_sharing` use the z of loop 2."""

    def __init__(self, config: MeltConfig):
        super().__init__(config)
        self.last = last_sharing(config.total_ut_steps)

    def keep(self, n: Tensor, h: Tensor, loop: int) -> Tensor | float:
        """Return z of this loop; a chunk's loops follow one another, so loop 2's is still there."""
        if not 2 < loop <= self.last:
            self.z = super().keep(n, h, loop)
        return self.z


def last_sharing(loops: int) -> int:
    """Return the last loop of the first half of 2..T, which has the middle one."""
    return 1 + math.ceil((loops - 1) / 2)


class LowRank(nn.Module):
    """A linear layer of low rank: x -> B A x + b."""

    def __init__(self, config: MeltConfig, rank: int, bias: bool):
        super().__init__()
        size = config.hidden_size
        std = math.sqrt(fresh_weight_std(config) / math.sqrt(max(rank, 1)))  # then the product has the gate's
        self.down = nn.Parameter(torch.randn(rank, size) * std)
        self.up = nn.Parameter(torch.randn(size, rank) * std)
        self.bias = nn.Parameter(torch.full((size,), GATE_BIAS)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    @torch.no_grad()
    def approximate(self, linear: nn.Linear) -> None:
        """Become the nearest layer of this rank to `linear`."""
        up, down = nearest_factors(linear.weight, len(self.down))
        self.up.copy_(up)
        self.down.copy_(down)
        if self.bias is not None:
            self.bias.copy_(linear.bias)


class BlockDiagonal(nn.Module):
    """A linear layer x -> W x + b, where W has square blocks on its diagonal and nothing beside them."""

    def __init__(self, config: MeltConfig, blocks: int, bias: bool):
        super().__init__()
        size = config.hidden_size
        width = size // blocks
        self.blocks = nn.Parameter(torch.randn(blocks, width, width) * fresh_weight_std(config))
        self.bias = nn.Parameter(torch.full((size,), GATE_BIAS)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        blocks, width, _ = self.blocks.shape
        y = torch.einsum("...bi,boi->...bo", x.unflatten(-1, (blocks, width)), self.blocks).flatten(-2)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def approximate(self, linear: nn.Linear) -> None:
        """Become the nearest layer of this form to `linear`: take the blocks on its diagonal."""
        blocks, width, _ = self.blocks.shape
        self.blocks.copy_(linear.weight.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        if self.bias is not None:
            self.bias.copy_(linear.bias)
