"""How deep a request thinks: its loops, from `vllm_xargs` or from OpenAI's `reasoning_effort`."""

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from melt_serve.config import MeltConfig

LOOPS = "loops"
EFFORT = "reasoning_effort"


def settle(params: SamplingParams, config: MeltConfig) -> SamplingParams:
    """The same parameters with the request's loops in `extra_args`, whatever said or did not say them.

    Raises:
        VLLMValidationError: loops that this checkpoint does not run; the message names the range.
    """
    extra = dict(params.extra_args or {})
    effort = extra.pop(EFFORT, None)
    loops = extra.get(LOOPS, config.total_ut_steps if effort is None else config.loops_by_effort[effort])
    assert config.max_loops is not None
    if isinstance(loops, bool) or loops not in range(1, config.max_loops + 1):
        raise VLLMValidationError(
            f"loops must be a whole number from 1 to {config.max_loops}, this checkpoint's max_loops, not {loops!r}",
            parameter=LOOPS,
            value=loops,
        )
    settled = params.clone()
    settled.extra_args = {**extra, LOOPS: int(loops)}
    return settled


def loops_of(params: SamplingParams | None) -> int:
    """A settled request's loops."""
    assert params is not None and params.extra_args is not None
    return params.extra_args[LOOPS]
