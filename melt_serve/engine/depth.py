"""A request's depth: its loops and exit threshold, from `vllm_xargs` or OpenAI's `reasoning_effort`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from reprlib import repr as shorten

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from melt_serve.config import EFFORTS, MeltConfig

EFFORT = "reasoning_effort"
"""The key under which `patches.py` leaves a request's effort in `extra_args`."""


@dataclass(frozen=True)
class Depth:
    """How many loops a request's tokens may run, and when they may leave early.

    Attributes:
        loops: the most loops a token runs.
        exit_threshold: a token leaves after the first loop by which Ouro's exit gate would have left with this
            probability (arXiv 2510.25741); at 1 none does.
    """

    loops: int
    exit_threshold: float


def default_depth(config: MeltConfig) -> Depth:
    """Return the depth of requests that ask for none."""
    return Depth(config.total_ut_steps, config.early_exit_threshold)


def resolve_depth(params: SamplingParams, config: MeltConfig) -> SamplingParams:
    """Validate a request's depth and write it out in a copy of its parameters, in `extra_args`, for `depth_of`.

    Raises:
        VLLMValidationError: a depth that this checkpoint does not run; the message names the range, and a long value
            is cut in it.
    """
    extra = dict(params.extra_args or {})
    effort = extra.pop(EFFORT, None)
    if effort is not None and effort not in EFFORTS:
        raise VLLMValidationError(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {shorten(effort)}",
            parameter=EFFORT,
            value=shorten(effort),
        )
    loops = extra.get("loops", config.total_ut_steps if effort is None else config.loops_by_effort[effort])
    threshold = extra.get("exit_threshold", config.early_exit_threshold)
    assert config.max_loops is not None
    if isinstance(loops, bool) or loops not in range(1, config.max_loops + 1):
        raise VLLMValidationError(
            f"loops must be a whole number from 1 to {config.max_loops}, this checkpoint's max_loops, "
            f"not {shorten(loops)}",
            parameter="loops",
            value=shorten(loops),
        )
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise VLLMValidationError(
            f"exit_threshold must be above 0 and at most 1, where no token exits early, not {shorten(threshold)}",
            parameter="exit_threshold",
            value=shorten(threshold),
        )
    resolved = params.clone()
    resolved.extra_args = {**extra, **asdict(Depth(int(loops), float(threshold)))}
    return resolved


def depth_of(params: SamplingParams | None) -> Depth:
    """Return a request's depth. `resolve_depth` must have made its parameters."""
    assert params is not None and params.extra_args is not None
    return Depth(params.extra_args["loops"], params.extra_args["exit_threshold"])


class StepDepths:
    """Decides which of a step's S tokens run on after a loop.

    Attributes:
        ran: [S], the loops that each token has run, once it has left; 0 before.
        may_exit: some request has an exit threshold.
    """

    def __init__(self, depths: Sequence[Depth], requests: Tensor, exit_gate: Callable[[Tensor], Tensor]):
        """Begin a step.

        Args:
            depths: one of each of the R requests.
            requests: [S], each token's request, as an index into `depths`.
            exit_gate: Ouro's exit gate, from normed states [A, d] to logits [A, 1].
        """
        self.exit_gate = exit_gate
        self.last_loops = {depth.loops for depth in depths}
        self.may_exit = any(depth.exit_threshold < 1 for depth in depths)
        thresholds = [depth.exit_threshold if depth.exit_threshold < 1 else torch.inf for depth in depths]
        self.thresholds = torch.tensor(thresholds, device=requests.device)[requests]
        self.last = torch.tensor([depth.loops for depth in depths], device=requests.device)[requests]
        self.remaining = torch.ones_like(self.thresholds)
        self.ran = torch.zeros_like(self.last)

    def select_staying(self, loop: int, tokens: Tensor, x: Tensor) -> Tensor | None:
        """Return [A], true for tokens that run another loop, or None if all do; record `ran` of the others.

        Args:
            loop: the loop that is over.
            tokens: [A], the tokens that ran it, as indices into the S.
            x: [A, d], their normed states after it.
        """
        if not self.may_exit and loop not in self.last_loops:
            return None
        stays = self.last[tokens] > loop
        if self.may_exit:
            self.remaining[tokens] *= 1 - torch.sigmoid(self.exit_gate(x).float()).squeeze(-1)
            stays &= ~(1 - self.remaining[tokens] >= self.thresholds[tokens])
        self.ran[tokens[~stays]] = loop
        return None if stays.all() else stays
