"""A request's depth: its loops and exit threshold, from `vllm_xargs` or OpenAI's `reasoning_effort`."""

from dataclasses import asdict, dataclass
from reprlib import repr as shorten

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from melt_serve.config import EFFORTS, LoopLMConfig

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


def default_depth(config: LoopLMConfig) -> Depth:
    """Return the depth of requests that ask for none."""
    return Depth(config.total_ut_steps, config.early_exit_threshold)


def resolve_depth(params: SamplingParams, config: LoopLMConfig) -> SamplingParams:
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
    if isinstance(loops, bool) or loops not in range(1, config.most_loops + 1):
        raise VLLMValidationError(
            f"loops must be a whole number from 1 to {config.most_loops}, this checkpoint's max_loops, "
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
