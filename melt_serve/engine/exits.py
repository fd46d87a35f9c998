"""Which tokens of a step exit early: the one thing about a step that only the device knows."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d

from melt_serve.engine.step import Selection, Sequences, StepPlan, to_host


class StepExits:
    """Asks Ouro's exit gate after each loop, in steps where some request has an exit threshold."""

    def __init__(self, plan: StepPlan, device: torch.device, exit_gate: Callable[[Tensor], Tensor]):
        """Begin a step.

        Args:
            plan: of the step.
            device: of the model.
            exit_gate: from normed states [A, d] to logits [A, 1].
        """
        self.plan = plan
        self.exit_gate = exit_gate
        self.may_exit = bool((plan.thresholds < 1).any())
        if self.may_exit:
            thresholds = plan.sequences.of_tokens(plan.thresholds[plan.sequences.requests])
            self.thresholds = async_tensor_h2d(np.where(thresholds < 1, thresholds, np.inf), device, torch.float32)
            self.remaining = torch.ones_like(self.thresholds)

    def decide(self, loop: int, sequences: Sequences, x: Tensor) -> np.ndarray:
        """Return which tokens exit after this loop, though they may run another one; the host waits for it if any may.

        Args:
            sequences: the A tokens that ran it.
            x: [A, d], their normed states after it.

        Returns:
            [those that may run another loop, the first of the A].
        """
        size = self.plan.tokens_after(loop, sequences)
        if not self.may_exit or not self.plan.waits_for_exits(loop, sequences):
            return np.zeros(size, dtype=bool)
        self.keep(slice(size))
        self.remaining = self.remaining * (1 - torch.sigmoid(self.exit_gate(x[:size]).float()).squeeze(-1))
        exited = 1 - self.remaining >= self.thresholds
        if get_tensor_model_parallel_world_size() > 1:  # ranks that differ in one bit would run different tokens
            exited = get_tp_group().broadcast(exited.to(torch.uint8), src=0).bool()
        return to_host(exited)

    def keep(self, staying: Selection) -> None:
        """Go on with some of the tokens."""
        if self.may_exit:
            self.thresholds, self.remaining = self.thresholds[staying], self.remaining[staying]
