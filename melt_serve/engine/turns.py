"""Whose turn it is when a prompt's chunk does not fit beside the decodes."""

from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from melt_serve.config import chunk_end

PATIENCE = 4
"""Steps a prompt waits for a budget that running requests use up, before some is reserved for it."""


@dataclass
class Reservation:
    """The `tokens` of a step's budget that a prompt needs, which has waited `steps_waited` steps for them."""

    request_id: str
    tokens: int
    steps_waited: int


class PrefillTurns:
    """Reserves budget for a prompt that has waited too long: vLLM schedules running requests first.

    Attributes:
        starved: the prompt that the last step's budget did not reach.
        reserved: this step's reservation, until its prompt is scheduled.
        scheduled: tokens scheduled in this step so far.
    """

    def __init__(self, scheduler: Scheduler, chunk_size: int):
        self.scheduler = scheduler
        self.chunk_size = chunk_size
        self.starved: Reservation | None = None
        self.reserved: Reservation | None = None
        self.scheduled = 0

    def begin_step(self) -> None:
        """Reserve budget for the starved prompt if its patience is at an end."""
        self.scheduled = 0
        if self.starved is not None and self.starved.steps_waited >= PATIENCE:
            self.reserved = self.starved
            self.starved = None

    def limit(self, request_id: str, wanted: int) -> int:
        """Return how many of the `wanted` tokens a request may run beside what is reserved for another one."""
        if self.reserved is None:
            return wanted
        if self.reserved.request_id == request_id:
            self.reserved = None
            return wanted
        left = self.scheduler.max_num_scheduled_tokens - self.scheduled - self.reserved.tokens
        return max(0, min(wanted, left))

    def end_step(self, output: SchedulerOutput) -> None:
        """Drop a reservation that was not used, and find the prompt that this step's budget did not reach."""
        self.reserved = None
        before = self.starved
        self.starved = None
        request = self._first_unserved(output)
        if request is None:
            return
        budget = self.scheduler.max_num_scheduled_tokens
        start = request.num_computed_tokens
        tokens = min(chunk_end(start, self.chunk_size), request.num_tokens) - start
        tokens = min(tokens, budget)
        if budget - output.total_num_scheduled_tokens >= tokens:
            return  # something else than the budget kept it out
        waited = before.steps_waited if before is not None and before.request_id == request.request_id else 0
        self.starved = Reservation(request.request_id, tokens, waited + 1)

    def _first_unserved(self, output: SchedulerOutput) -> Request | None:
        """Return the first prompt that got nothing in this step, though vLLM did not defer it."""
        scheduler = self.scheduler
        served = output.num_scheduled_tokens
        unserved = (each for each in scheduler.running if each.is_prefill_chunk and each.request_id not in served)
        request = next(unserved, None)
        if request is None and scheduler.waiting and len(scheduler.running) < scheduler.max_num_active_reqs:
            request = scheduler.waiting.peek_request()
        return None if request in scheduler.deferred_waiting else request
