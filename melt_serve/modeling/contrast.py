"""Contrast of depths: an answer is moved on, away from what an earlier loop would have said (README.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """How far each sequence's answers go on, and from which loop.

    Attributes:
        weights: [B], w; 0 where there is no contrast.
        loops: [B], k.
    """

    weights: Tensor
    loops: Tensor

    @classmethod
    def of(cls, weight: float | Tensor | None, loop: int | Tensor | None, loops: Tensor) -> Contrast | None:
        """Return what a call asks for; None if it asks for nothing.

        Args:
            weight: w, or [B].
            loop: k, by default half of the loops, at least 1; or [B].
            loops: [B], the loops each sequence may run.

        Raises:
            ValueError: a weight is below 0 or not finite; a loop is not before the last one; a loop without a weight.
        """
        if weight is None:
            if loop is not None:
                raise ValueError(f"contrast_loop={loop} needs a contrast")
            return None
        weights = torch.as_tensor(weight, device=loops.device, dtype=torch.float32).expand(len(loops))
        if not torch.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"contrast must be a number from 0, not {weights.tolist()}")
        half = (loops // 2).clamp(min=1)
        each = half if loop is None else torch.as_tensor(loop, device=loops.device).expand(len(loops))
        if each.is_floating_point() or (((each < 1) | (each >= loops)) & (weights > 0)).any():
            raise ValueError(f"contrast_loop must be from 1 to below the loops, {loops.tolist()}, not {each.tolist()}")
        return cls(weights, torch.where(weights > 0, each, half))

    def combine(self, states: Sequence[Tensor]) -> Tensor:
        """Return the states whose logits are the contrasted ones, [B, S, d].

        The head is linear: lm_head(x_T + w (x_T - x_k)) = logits_T + w (logits_T - logits_k).

        Args:
            states: the normed states after each loop, T of [B, S, d]; of a token that has left, its last one.
        """
        x = states[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        earlier = torch.stack(list(states))[self.loops - 1, torch.arange(len(x), device=x.device)].to(wide)
        weights = self.weights[:, None, None].to(wide)
        return (x.to(wide) + weights * (x.to(wide) - earlier)).to(x.dtype)
