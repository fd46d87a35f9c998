"""How many loops a token runs: its sequence's, or fewer where Ouro's exit gate says so (README.md, section 4)."""

import torch
from torch import Tensor


class TokenDepths:
    """Which tokens still run, from loop to loop: those of a MELT's chunk, or of a call to a LoopLM.

    A token leaves after the first loop t with 1 - prod_{s <= t} (1 - lambda_s) >= its sequence's threshold, lambda_s
    being the exit gate's probability after loop s (arXiv 2510.25741); at the latest after its sequence's last loop.

    Attributes:
        active: [B, S], true for tokens that run the next loop.
        ran: [B, S], the loops of tokens that have left; 0 for others and for padding.
        remaining: [B, S], each token's probability to run the next loop, prod_{s <= t} (1 - lambda_s).
        together: all tokens run the same loops, so that none is ever left behind.
    """

    def __init__(self, real: Tensor, loops: Tensor, thresholds: Tensor, together: bool = False):
        """Let every token run loop 1.

        Args:
            real: [B, S], false for padding, which runs none; unless `together`, where it runs with the others.
            loops: [B], the loops each sequence may run.
            thresholds: [B], each sequence's, in (0, 1]; at 1 no token leaves early.
        """
        self.loops, self.thresholds, self.together = loops[:, None], thresholds[:, None], together
        self.active = real
        self.ran = torch.zeros_like(real, dtype=torch.long)
        self.remaining = torch.ones_like(real, dtype=torch.float32)

    def keep(self, new: Tensor, old: Tensor | None) -> Tensor:
        """Take `new` for tokens that run this loop, `old` for those that have left: [B, S, d] each."""
        return new if old is None or self.together else torch.where(self.active[:, :, None], new, old)

    def after(self, loop: int, exit_probabilities: Tensor) -> None:
        """Let tokens leave after this loop; lambda is [B, S]."""
        self.remaining = self.remaining * (1 - exit_probabilities.float())
        early = (1 - self.remaining >= self.thresholds) & (self.thresholds < 1)
        leaving = self.active & (early | (loop >= self.loops))
        self.ran = torch.where(leaving, loop, self.ran)
        self.active = self.active & ~leaving
