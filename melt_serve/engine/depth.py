"""What a request asks of its steps: its depth, a contrast of depths, and to be told what each token ran.

It asks in `vllm_xargs`, for its depth also by OpenAI's `reasoning_effort`.
"""

from dataclasses import asdict, dataclass
from reprlib import repr as shorten
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingType

from melt_serve.config import EFFORTS, LoopLMConfig

EFFORT = "reasoning_effort"
"""The key under which `patches.py` leaves a request's effort in `extra_args`."""
RETURN_LOOPS = "return_loops"
"""The key under which a request asks to be told what each of its generated tokens ran."""
MOST_CONTRAST = 10
"""The largest weight of a contrast that is taken: far beyond what helps, and finite in every dtype."""


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


@dataclass(frozen=True)
class Contrast:
    """What an answer adds to its last loop's logits: `weight` times their difference to those of `loop`.

    No row depends on it, so it is no part of a request's depth.
    """

    weight: float
    loop: int


@dataclass(frozen=True)
class Asked:
    """What a request asks of the steps that it runs in.

    Attributes:
        contrast: None for none.
        returns_loops: whether it wants to know what each generated token ran.
    """

    depth: Depth
    contrast: Contrast | None = None
    returns_loops: bool = False


def default_depth(config: LoopLMConfig) -> Depth:
    """Return the depth of requests that ask for none."""
    return Depth(config.total_ut_steps, config.early_exit_threshold)


def resolve_depth(params: SamplingParams, config: LoopLMConfig) -> SamplingParams:
    """Validate what a request asks and write it out in a copy of its parameters, in `extra_args`, for `asked_of`.

    Raises:
        VLLMValidationError: something that this checkpoint does not do; the message names the range, and a long value
            is cut in it.
    """
    extra = dict(params.extra_args or {})
    effort = extra.pop(EFFORT, None)
    if effort is not None and effort not in EFFORTS:
        raise refusal(EFFORT, effort, f"must be one of {', '.join(EFFORTS)}")
    loops = extra.get("loops", config.total_ut_steps if effort is None else config.loops_by_effort[effort])
    threshold = extra.get("exit_threshold", config.early_exit_threshold)
    if isinstance(loops, bool) or loops not in range(1, config.most_loops + 1):
        raise refusal(
            "loops", loops, f"must be a whole number from 1 to {config.most_loops}, this checkpoint's max_loops"
        )
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise refusal("exit_threshold", threshold, "must be above 0 and at most 1, where no token exits early")
    extra |= asdict(Depth(int(loops), float(threshold)))
    if "contrast" in extra or "contrast_loop" in extra:
        contrast = resolve_contrast(extra.get("contrast"), extra.get("contrast_loop"), int(loops))
        extra |= {"contrast": contrast.weight, "contrast_loop": contrast.loop}
    if (told := extra.get(RETURN_LOOPS, False)) not in (True, False):
        raise refusal(RETURN_LOOPS, told, "must be true or false")
    resolved = params.clone()
    resolved.extra_args = extra
    return resolved


def resolve_contrast(weight: Any, loop: Any, loops: int) -> Contrast:
    """Validate the contrast of a request of so many loops.

    Raises:
        VLLMValidationError: as `resolve_depth`.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MOST_CONTRAST:
        raise refusal("contrast", weight, f"must be a number from 0, for none, to {MOST_CONTRAST}")
    if weight and loops == 1:
        raise refusal("contrast", weight, "needs a loop before the last one, so at least 2 loops; with 1 it must be 0")
    if not weight and loop in (None, 0):  # 0 where it was resolved before
        return Contrast(0.0, 0)
    loop, most = max(1, loops // 2) if loop is None else loop, max(1, loops - 1)
    if isinstance(loop, bool) or loop not in range(1, most + 1):
        raise refusal("contrast_loop", loop, f"must be a whole number from 1 to {most}, below the request's loops")
    return Contrast(float(weight), int(loop)) if weight else Contrast(0.0, 0)


def refusal(parameter: str, value: Any, rule: str) -> VLLMValidationError:
    """Make the error that says what a parameter must be."""
    return VLLMValidationError(f"{parameter} {rule}, not {shorten(value)}", parameter=parameter, value=shorten(value))


def depth_of(params: SamplingParams | None) -> Depth:
    """Return a request's depth. `resolve_depth` must have made its parameters."""
    assert params is not None and params.extra_args is not None
    return Depth(params.extra_args["loops"], params.extra_args["exit_threshold"])


def takes_drafts(params: SamplingParams | None) -> bool:
    """Return whether drafts change nothing for a request: it does not draw with a seed.

    To verify a draft takes draws from the request's generator, and how many drafts there are depends on other requests.
    """
    return params is None or params.sampling_type is not SamplingType.RANDOM_SEED


def asked_of(params: SamplingParams | None) -> Asked:
    """Return all that a request asks. `resolve_depth` must have made its parameters."""
    depth = depth_of(params)
    assert params is not None and params.extra_args is not None
    extra = params.extra_args
    contrast = Contrast(extra["contrast"], extra["contrast_loop"]) if extra.get("contrast") else None
    return Asked(depth, contrast, bool(extra.get(RETURN_LOOPS)))
