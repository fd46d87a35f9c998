"""What only the device knows about a step: which tokens exit early, and what the exit gate says."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d

from melt_serve.engine.step import Running, Selection, Sequences, StepPlan, begin_to_host, to_device, to_host


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


class ExitReport:
    """Notes exit probabilities of tokens that are sampled from, in steps where some request asks for them."""

    def __init__(self, plan: StepPlan, device: torch.device, exit_gate: Callable[[Tensor], Tensor]):
        """Begin a step; see `StepExits`."""
        self.plan = plan
        self.exit_gate = exit_gate
        self.requests = [request for request, asked in enumerate(plan.asked) if asked.returns_loops]
        if self.requests:
            sequences = plan.sequences
            last = np.empty_like(sequences.first)
            last[sequences.requests] = sequences.first + np.diff(sequences.starts) - 1
            self.rows = np.full(len(plan.ran), -1, dtype=np.int32)
            self.rows[last[self.requests]] = np.arange(len(self.requests))
            self.probabilities = torch.zeros(len(self.requests), plan.deepest, dtype=torch.float32, device=device)

    def note(self, loop: int, running: Running, x: Tensor) -> None:
        """Note what the gate says after a loop.

        Args:
            running: the A tokens that ran it.
            x: [A, d], their normed states after it.
        """
        if not self.requests:
            return
        rows = self.rows[running.sequences.tokens]
        (wanted,) = np.nonzero(rows >= 0)
        if len(wanted):
            tokens, rows_there = to_device(x.device, wanted, rows[wanted])
            said = torch.sigmoid(self.exit_gate(x[tokens]).float()).squeeze(-1)
            self.probabilities.select(1, loop - 1)[rows_there] = said

    def close(self) -> None:
        """Let the plan have what was noted, once the device has come so far."""
        if self.requests:
            said = begin_to_host(self.probabilities)
            self.plan.exit_probabilities.update(zip(self.requests, said, strict=True))
