"""What the scheduler counts, and how the counts reach the API servers: in the one field of vLLM's statistics for
numbers by name, `num_kv_fetch_reqs_by_stage`. `api/metrics.py` takes them out again.
"""

from dataclasses import asdict, dataclass, fields

from vllm.v1.metrics.stats import SchedulerStats

OURS = "melt_"
"""What the names of our numbers begin with, among vLLM's."""


@dataclass
class StepCounts:
    """What happened since the last step's statistics, and what the cache holds now.

    Attributes:
        final_blocks, open_blocks: held by running requests; a shared block counts once.
        looplm_blocks: what the final rows would be in a LoopLM, by the mean loops of the tokens that hold them.
    """

    pieces: int = 0
    cuts: int = 0
    waits: int = 0
    lost_hit_tokens: int = 0
    replays: int = 0
    replayed_tokens: int = 0
    final_blocks: int = 0
    open_blocks: int = 0
    looplm_blocks: int = 0

    def put(self, stats: SchedulerStats) -> None:
        """Send these along."""
        stats.num_kv_fetch_reqs_by_stage |= {OURS + name: count for name, count in asdict(self).items()}

    @classmethod
    def take(cls, stats: SchedulerStats) -> "StepCounts | None":
        """Take them out again; None where there are none."""
        numbers = stats.num_kv_fetch_reqs_by_stage
        names = [field.name for field in fields(cls)]
        if OURS + names[0] not in numbers:
            return None
        return cls(**{name: numbers.pop(OURS + name) for name in names})
