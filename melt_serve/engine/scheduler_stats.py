"""What the scheduler counts, and how the counts reach the API servers.

They ride in the one field of vLLM's statistics for numbers by name, `num_kv_fetch_reqs_by_stage`. `api/metrics.py`
takes them out again.
"""

from dataclasses import asdict, dataclass, fields

from vllm.v1.metrics.stats import SchedulerStats

OURS = "melt_"
"""The prefix that tells our numbers from vLLM's."""


@dataclass
class StepCounts:
    """What happened since the last statistics, and what the cache holds now.

    Attributes:
        pieces: parts of requests that ran in a step.
        cuts: of these, ended with their chunk, though there were tokens and budget for more.
        deferred: parts put off because the step's budget ended inside their chunk.
        lost_hit_tokens: cached tokens behind the last place where a hit may end.
        replays, replayed_tokens: requests that ran again after a preemption, and their tokens that did.
        final_blocks, open_blocks: held by running requests; a shared block counts once.
        looplm_blocks: what the final rows would be in a LoopLM, by the mean loops of the tokens that hold them.
    """

    pieces: int = 0
    cuts: int = 0
    deferred: int = 0
    lost_hit_tokens: int = 0
    replays: int = 0
    replayed_tokens: int = 0
    final_blocks: int = 0
    open_blocks: int = 0
    looplm_blocks: int = 0

    def put(self, stats: SchedulerStats) -> None:
        """Add the counts to vLLM's statistics."""
        stats.num_kv_fetch_reqs_by_stage |= {OURS + name: count for name, count in asdict(self).items()}

    @classmethod
    def take(cls, stats: SchedulerStats) -> "StepCounts | None":
        """Remove the counts from vLLM's statistics and return them; None if there are none."""
        numbers = stats.num_kv_fetch_reqs_by_stage
        names = [field.name for field in fields(cls)]
        if OURS + names[0] not in numbers:
            return None
        return cls(**{name: numbers.pop(OURS + name) for name in names})
