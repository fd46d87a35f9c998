"""Contrast of depths in a step: states after an earlier loop are kept, and move the last ones on."""

import numpy as np
import torch
from torch import Tensor

from melt_serve.engine.step import Running, StepPlan, compose, to_device


class StepContrasts:
    """Adds to the last states of tokens, w times, what came to them after loop k, where their request asks for it.

    The head is linear, so logits of x_T + w (x_T - x_k) are the contrasted ones. A token that has left at or before
    loop k keeps its own last state.

    Attributes:
        kept: for each loop after which states were kept: the tokens [L], as indices into the step's S, their w [L, 1],
            and their normed states [L, d].
    """

    def __init__(self, plan: StepPlan):
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        contrasts = [asked.contrast for asked in plan.asked]
        self.wanted = any(contrasts)
        if self.wanted:
            self.loops = np.array([each.loop if each else 0 for each in contrasts], dtype=np.int32)
            self.weights = np.array([each.weight if each else 0 for each in contrasts], dtype=np.float32)

    def keep(self, loop: int, running: Running, x: Tensor) -> None:
        """Keep the states after this loop, if it is some request's k.

        Args:
            running: the A tokens that ran it.
            x: [A, d], their normed states after it; they may be overwritten later.
        """
        if not self.wanted:
            return
        sequences = running.sequences
        own = sequences.of_tokens(sequences.requests)
        (tokens,) = np.nonzero(self.loops[own] == loop)
        if len(tokens):
            weights = self.weights[own[tokens]].view(np.int32)  # so that one copy takes both
            index, bits = to_device(x.device, tokens, weights)
            self.kept.append((compose(running.tokens, index), bits.view(torch.float32)[:, None], x[index]))

    def apply(self, x: Tensor) -> Tensor:
        """Contrast the states after every token's last loop, [S, d], in float32 and in place; return them."""
        for tokens, weights, earlier in self.kept:
            last = x[tokens].float()
            x[tokens] = (last + weights * (last - earlier.float())).to(x.dtype)
        return x
