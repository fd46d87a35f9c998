"""Scenes that servers go through, played on a live engine: who asks what and when, in how much time and room."""

import copy
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import one_hot
from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.outputs import CompletionOutput
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import RequestStatus

from melt_serve.modeling import MeltForCausalLM
from tests.engine.adapters import Adapter
from tests.engine.engines import VOCABULARY, engine_logprobs, everything, reference_logits, scheduler_of

MAX_LENGTH = 320
LARGE = 1e4
"""Instead of infinity, where log-probabilities are compared."""
LIMITS = {
    "max_model_len": MAX_LENGTH,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 6,
    "block_size": 32,
    "logprobs_mode": "processed_logprobs",  # after penalties and grammars
    "skip_tokenizer_init": False,  # grammars need one
}
"""Options of the engines that scenes are played on; `save_tokenizer` makes what they need beside a checkpoint."""


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
        penalty: for what was said before: presence and frequency, and repetition as 1 + penalty.
        alternates: its answer follows a grammar: a token of the vocabulary's first half, one of its second, and so on.
        adapter: which of the server's LoRA adapters it names; none, or the server has none, if None.
        leaves: so many engine steps after it arrived it is cancelled; it may have its answer by then.
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
    penalty: float = 0.0
    alternates: bool = False
    adapter: int | None = None
    leaves: int | None = None


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


ALTERNATING = f"([0-3][0-9a-f][4-7][0-9a-f]){{{MAX_LENGTH}}}"
"""A grammar that `save_tokenizer` understands; it has no end within a request's length."""

CROWD = tuple(Ask(arrives=i, document=0, shared=200, own=20 + i, answer=90, n=1 + i % 2) for i in range(6))
TALK = tuple(Ask(arrives=20 * i, document=1, shared=90, own=9, answer=40, continues=i - 1) for i in range(5))
LEAVERS = tuple(replace(ask, leaves=(None, 3, 0, None, 40, 90)[i], penalty=i / 5) for i, ask in enumerate(CROWD))
MIXED = tuple(
    replace(
        ask, loops=(6, 1, 3)[i % 3], exit_threshold=(1, 0.6)[i % 2], alternates=i % 2 == 0, adapter=(0, None, 1)[i % 3]
    )
    for i, ask in enumerate(CROWD)
)
SCENES = (
    Scene(CROWD, budget=97, spare_blocks=0),
    Scene(LEAVERS, spare_blocks=2, ahead=True),
    Scene(MIXED, budget=128, spare_blocks=2),
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
    """A live engine with its reference and its adapters, and counts of what its scheduler has done.

    The reference runs in float64, so that the engine alone rounds: after six loops of two layers float32 is up to 5e-5
    from it, on either side.
    """

    def __init__(self, llm: LLM, model: MeltForCausalLM, adapters: Sequence[Adapter] = ()):
        self.llm, self.model, self.counts = llm, copy.deepcopy(model).double(), Counter()
        self.adapters = [Adapter(request, merged.double()) for request, merged in adapters]

    def distances(self, scene: Scene) -> dict[tuple[int, int], float]:
        """Play the scene; return each answer's largest difference in log-probability from the reference."""
        scene = scene if self.adapters else replace(scene, asks=tuple(replace(ask, adapter=None) for ask in scene.asks))
        played = play(self.llm, scene, self.adapters)
        self.counts.update(played.counts)
        whole = {which for which, answer in played.answers.items() if answer.finish_reason == "length"}
        assert whole >= {
            (number, n) for number, ask in enumerate(scene.asks) for n in range(ask.n) if ask.leaves is None
        }
        distances = {}
        for adapter in {scene.asks[number].adapter for number, _ in played.answers}:
            answers = {which: said for which, said in played.answers.items() if scene.asks[which[0]].adapter == adapter}
            asks = [scene.asks[number] for number, _ in answers]
            prompts = [played.prompts[number] for number, _ in answers]
            logits = reference_logits(
                self.model if adapter is None else self.adapters[adapter].merged,
                prompts,
                [answer.token_ids for answer in answers.values()],
                [ask.loops or self.model.config.total_ut_steps for ask in asks],
                [float(ask.exit_threshold) for ask in asks],
            )
            for ask, prompt, (which, answer), before in zip(asks, prompts, answers.items(), logits, strict=True):
                expected = processed(before, ask, prompt, answer.token_ids).log_softmax(-1)
                difference = engine_logprobs(answer).clamp(min=-LARGE) - expected.clamp(min=-LARGE)
                distances[which] = difference.abs().max().item()
        return distances


def processed(logits: torch.Tensor, ask: Ask, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the logits before each token of the answer, [generated, vocabulary], after grammar and penalties.

    What a grammar forbids is minus infinity. Penalties are OpenAI's, and the repetition penalty of transformers, which
    counts the prompt's tokens, too.
    """
    logits = logits.clone()
    if ask.alternates:
        logits[0::2, VOCABULARY // 2 :] = -torch.inf
        logits[1::2, : VOCABULARY // 2] = -torch.inf
    said = one_hot(torch.tensor(answer), VOCABULARY)
    counts = said.cumsum(0) - said
    seen = (counts > 0) | one_hot(torch.tensor(prompt), VOCABULARY).any(0)
    again = 1 + ask.penalty
    logits = torch.where(seen, torch.where(logits > 0, logits / again, logits * again), logits)
    return logits - ask.penalty * (counts + (counts > 0))


def play(llm: LLM, scene: Scene, adapters: Sequence[Adapter] = ()) -> Played:
    """Run the scene step by step; leave the engine as it was, but for the prefix cache."""
    live, played, scheduler = llm.llm_engine, Played(), scheduler_of(llm)
    arriving = sorted(range(len(scene.asks)), key=lambda number: scene.asks[number].arrives)
    leaving: dict[int, int] = {}
    if not scene.warm:
        assert live.reset_prefix_cache()
    blocks = None if scene.spare_blocks is None else blocks_of_longest(scheduler) + scene.spare_blocks
    with (
        confined(scheduler, scene.budget, blocks),
        counted(scheduler) as played.counts,
        # With drafts vLLM schedules no step ahead: their number is known once they are verified.
        scheduled_ahead(live.engine_core.engine_core, scene.ahead and not scheduler.num_spec_tokens),
    ):
        for step in range(5000):
            while arriving and (scene.asks[arriving[0]].arrives <= step or not live.has_unfinished_requests()):
                number = arriving.pop(0)
                ask = scene.asks[number]
                prompt = played.prompts[number] = prompt_of(scene, number, played)
                live.add_request(
                    str(number),
                    TokensPrompt(prompt_token_ids=prompt),
                    sampling(ask, len(prompt)),
                    lora_request=None if ask.adapter is None else adapters[ask.adapter].request,
                    priority=ask.priority,
                )
                if ask.leaves is not None:
                    leaving[number] = step + ask.leaves
            live.abort_request([str(number) for number, when in leaving.items() if when == step])
            if not arriving and not live.has_unfinished_requests():
                return played
            for output in live.step():
                for answer in output.outputs:
                    played.answers[int(output.request_id), answer.index] = answer
    raise AssertionError("the engine makes no progress")


def save_tokenizer(path: Path) -> None:
    """Save a tokenizer whose tokens are their own ids, in two hexadecimal digits."""
    words = {f"{number:02x}": number for number in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="00"))).save_pretrained(path)


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
    return everything(
        answer,
        temperature=temperature,
        seed=ask.seed,
        n=ask.n,
        extra_args=depth,
        presence_penalty=ask.penalty,
        frequency_penalty=ask.penalty,
        repetition_penalty=1 + ask.penalty,
        structured_outputs=StructuredOutputsParams(regex=ALTERNATING) if ask.alternates else None,
    )


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
        grammars = core.scheduler.get_grammar_bitmask(scheduled)
        output = core.model_executor.execute_model(scheduled) or core.model_executor.sample_tokens(grammars)
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
    """Count what a live scheduler does: preemptions, tokens found in the prefix cache, requests passed over, drafts."""
    counts: Counter = Counter()
    manager = scheduler.kv_cache_manager
    preempt, ready, record, drafts = (
        scheduler._preempt_request,
        scheduler._handle_blocked_waiting_request,
        manager.record_prefix_cache_stats,
        scheduler.make_spec_decoding_stats,
    )

    def counting_preempt(*args: Any, **kwargs: Any) -> None:
        counts["preempted"] += 1
        preempt(*args, **kwargs)

    def counting_ready(request: Any) -> bool:
        waits_for_grammar = request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        counts["passed over"] += not (answer := ready(request)) and not waits_for_grammar
        return answer

    def counting_record(request: Any, hits: int) -> None:
        counts["hit"] += hits
        record(request, hits)

    def counting_drafts(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **others: Any) -> Any:
        counts["accepted"] += num_accepted_tokens
        counts["rejected"] += num_draft_tokens - num_accepted_tokens
        return drafts(stats, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens, **others)

    scheduler.make_spec_decoding_stats = counting_drafts
    scheduler._preempt_request, scheduler._handle_blocked_waiting_request = counting_preempt, counting_ready
    manager.record_prefix_cache_stats = counting_record
    try:
        yield counts
    finally:
        del scheduler._preempt_request, scheduler._handle_blocked_waiting_request, scheduler.make_spec_decoding_stats
        del manager.record_prefix_cache_stats
