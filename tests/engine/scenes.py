"""Scenes that servers go through, played on a live engine: who asks what and when, in how much time and room."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.outputs import CompletionOutput
from vllm.v1.request import RequestStatus

from melt_serve.modeling import MeltForCausalLM
from tests.engine.engines import VOCABULARY, engine_logprobs, everything, reference_logprobs, scheduler_of

MAX_LENGTH = 320
LIMITS = {"max_model_len": MAX_LENGTH, "max_num_batched_tokens": 512, "max_num_seqs": 6, "block_size": 32}
"""Options of the engines that scenes are played on."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        arrives: the engine step before which it arrives.
        document: which of a few documents its prompt begins with...
        shared: ...and how many tokens of it.
        own: tokens that only this prompt has, after those.
        answer: tokens to generate.
        continues: begin instead with all that this earlier request holds by then, prompt and answer.
        seed: of its sampling; greedy without one.
        n: answers to the same prompt.
        loops: at most so many; the checkpoint's own without.
        exit_threshold: at which its tokens leave the loops early; 1 for never.
        priority: the lower, the sooner; of use under vLLM's priority policy only.
    """

    arrives: int
    document: int
    shared: int
    own: int
    answer: int
    continues: int | None = None
    seed: int | None = None
    n: int = 1
    loops: int | None = None
    exit_threshold: float = 1.0
    priority: int = 0


@dataclass(frozen=True)
class Scene:
    """Requests, and what the engine has for them.

    Attributes:
        budget: tokens a step.
        spare_blocks: KV blocks beyond those of one request of full length; all there are if None.
        warm: start with what the prefix cache holds of earlier scenes.
        ahead: schedule each step before the one before it has run, as vLLM does where it runs asynchronously.
    """

    asks: tuple[Ask, ...]
    budget: int = 512
    spare_blocks: int | None = None
    warm: bool = False
    ahead: bool = False


CROWD = tuple(Ask(arrives=i, document=0, shared=200, own=20 + i, answer=90, n=1 + i % 2) for i in range(6))
TALK = tuple(Ask(arrives=20 * i, document=1, shared=90, own=9, answer=40, continues=i - 1) for i in range(5))
DEPTHS = tuple(replace(ask, loops=(6, 1, 3)[i % 3], exit_threshold=(1, 0.7)[i % 2]) for i, ask in enumerate(CROWD))
SCENES = (
    Scene(CROWD, budget=97, spare_blocks=0),
    Scene(CROWD, spare_blocks=2, ahead=True),
    Scene(DEPTHS, budget=128, spare_blocks=2),
    Scene(TALK, spare_blocks=0),
)
"""What every kind of engine must stand; together they preempt, hit the prefix cache and pass requests over."""


@dataclass
class Played:
    """A played scene: prompts, answers by (request, index), and how often the scheduler did what is counted."""

    prompts: dict[int, list[int]] = field(default_factory=dict)
    answers: dict[tuple[int, int], CompletionOutput] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)


class Server:
    """A live engine with its reference, and counts of what its scheduler has done."""

    def __init__(self, llm: LLM, model: MeltForCausalLM):
        self.llm, self.model, self.counts = llm, model, Counter()

    def distances(self, scene: Scene) -> dict[tuple[int, int], float]:
        """Play the scene; return each answer's largest difference in log-probability from the reference."""
        played = play(self.llm, scene)
        self.counts.update(played.counts)
        assert len(played.answers) == sum(ask.n for ask in scene.asks)
        asks = [scene.asks[number] for number, _ in played.answers]
        expected = reference_logprobs(
            self.model,
            [played.prompts[number] for number, _ in played.answers],
            [answer.token_ids for answer in played.answers.values()],
            [ask.loops or self.model.config.total_ut_steps for ask in asks],
            [float(ask.exit_threshold) for ask in asks],
        )
        return {
            which: (engine_logprobs(answer) - logprobs).abs().max().item()
            for (which, answer), logprobs in zip(played.answers.items(), expected, strict=True)
        }


def play(llm: LLM, scene: Scene) -> Played:
    """Run the scene step by step; leave the engine as it was, but for the prefix cache."""
    live, played, scheduler = llm.llm_engine, Played(), scheduler_of(llm)
    arriving = sorted(range(len(scene.asks)), key=lambda number: scene.asks[number].arrives)
    if not scene.warm:
        assert live.reset_prefix_cache()
    blocks = None if scene.spare_blocks is None else blocks_of_longest(scheduler) + scene.spare_blocks
    with (
        confined(scheduler, scene.budget, blocks),
        counted(scheduler) as played.counts,
        scheduled_ahead(live.engine_core.engine_core, scene.ahead),
    ):
        for step in range(5000):
            while arriving and (scene.asks[arriving[0]].arrives <= step or not live.has_unfinished_requests()):
                number = arriving.pop(0)
                prompt = played.prompts[number] = prompt_of(scene, number, played)
                parameters = sampling(scene.asks[number], len(prompt))
                ask = TokensPrompt(prompt_token_ids=prompt)
                live.add_request(str(number), ask, parameters, priority=scene.asks[number].priority)
            if not live.has_unfinished_requests():
                return played
            for output in live.step():
                for answer in output.outputs:
                    played.answers[int(output.request_id), answer.index] = answer
    raise AssertionError("the engine makes no progress")


def prompt_of(scene: Scene, number: int, played: Played) -> list[int]:
    """Return the tokens a request brings, as far as there is room for two generated ones."""
    ask = scene.asks[number]
    own = random_tokens(ask.own, seed=number)
    if ask.continues in played.prompts:
        answer = played.answers.get((ask.continues, 0))
        begin = [*played.prompts[ask.continues], *(answer.token_ids if answer else ())]
    else:
        begin = random_tokens(MAX_LENGTH, seed=1000 + ask.document)[: ask.shared]
    return [*begin, *own][: MAX_LENGTH - 2]


def random_tokens(length: int, seed: int) -> list[int]:
    """Draw token ids that depend on the seed alone."""
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampling(ask: Ask, prompt_length: int) -> SamplingParams:
    """Return vLLM's parameters for the request, its answer no longer than there is room."""
    temperature = 0 if ask.seed is None and ask.n == 1 else 1
    depth = {"exit_threshold": ask.exit_threshold, **({} if ask.loops is None else {"loops": ask.loops})}
    answer = min(ask.answer, MAX_LENGTH - prompt_length)
    return everything(answer, temperature=temperature, seed=ask.seed, n=ask.n, extra_args=depth)


def blocks_of_longest(scheduler: Any) -> int:
    """Return how many blocks one request of full length may need: without them it would wait for ever."""
    config = scheduler.vllm_config
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    return sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs)


@contextmanager
def confined(scheduler: Any, budget: int | None = None, blocks: int | None = None) -> Iterator[None]:
    """Give a live scheduler this many tokens a step and free blocks; afterwards every block must be back.

    None leaves it what it has.
    """
    pool = scheduler.kv_cache_manager.block_pool
    free, budget_before = pool.get_num_free_blocks(), scheduler.max_num_scheduled_tokens
    taken = [] if blocks is None else pool.get_new_blocks(free - blocks)
    scheduler.max_num_scheduled_tokens = budget_before if budget is None else budget
    try:
        yield
    finally:
        scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)  # none, unless the scene failed
        scheduler.max_num_scheduled_tokens = budget_before
        pool.free_blocks(taken)
    assert pool.get_num_free_blocks() == free, "blocks were lost"


@contextmanager
def scheduled_ahead(core: Any, ahead: bool) -> Iterator[None]:
    """Keep a live engine, which runs synchronously on a CPU, one step behind its scheduler."""
    under_way: deque = deque()

    def run_oldest() -> dict:
        scheduled = under_way.popleft()
        output = core.model_executor.execute_model(scheduled) or core.model_executor.sample_tokens(None)
        return core.scheduler.update_from_output(scheduled, output)

    def step() -> tuple[dict, bool]:
        if core.scheduler.has_requests():
            under_way.append(core.scheduler.schedule())
        return (run_oldest(), True) if len(under_way) == 2 or not core.scheduler.has_requests() else ({}, False)

    synchronous = core.step_fn
    core.step_fn = step if ahead else synchronous
    try:
        yield
    finally:
        while under_way:
            run_oldest()
        core.step_fn = synchronous


@contextmanager
def counted(scheduler: Any) -> Iterator[Counter]:
    """Count what a live scheduler does: preemptions, tokens found in the prefix cache, requests passed over."""
    counts: Counter = Counter()
    manager = scheduler.kv_cache_manager
    preempt, ready, record = (
        scheduler._preempt_request,
        scheduler._handle_blocked_waiting_request,
        manager.record_prefix_cache_stats,
    )

    def counting_preempt(*args: Any, **kwargs: Any) -> None:
        counts["preempted"] += 1
        preempt(*args, **kwargs)

    def counting_ready(request: Any) -> bool:
        counts["passed over"] += not (answer := ready(request))
        return answer

    def counting_record(request: Any, hits: int) -> None:
        counts["hit"] += hits
        record(request, hits)

    scheduler._preempt_request, scheduler._handle_blocked_waiting_request = counting_preempt, counting_ready
    manager.record_prefix_cache_stats = counting_record
    try:
        yield counts
    finally:
        del scheduler._preempt_request, scheduler._handle_blocked_waiting_request, manager.record_prefix_cache_stats
