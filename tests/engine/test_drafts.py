"""Drafts change no answer: in `chunk` mode and of a LoopLM, whatever they are and wherever chunks end.

The engines draft as many tokens as make a whole chunk with the one before them: C = n + 1. Their drafts are n-grams, or
what a test proposes in their place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from vllm import LLM, TokensPrompt
from vllm.exceptions import VLLMValidationError

from melt_serve.engine import scheduler as scheduler_module
from melt_serve.engine.scheduler import tokens_in_step
from tests.engine.engines import (
    AROUND_CUTS,
    CONTRASTS,
    DEPTHS,
    EXITS,
    LENGTHS,
    RIGHT,
    VOCABULARY,
    WRONG,
    distance,
    engine,
    everything,
    generate,
    on,
    prompts,
    save_looplm,
    save_melt,
    scheduler_of,
)
from tests.engine.random_scenes import FEW, judge, plays
from tests.engine.scenes import LIMITS, MAX_LENGTH, Server, counted, save_tokenizer
from tests.engine.test_depth import loops_run

CHUNK = 32
NGRAMS = {"method": "ngram", "num_speculative_tokens": CHUNK - 1, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def save_chunked(path, **overrides):
    return save_melt(path, **{"decode_mode": "chunk", "chunk_size": CHUNK, "num_hidden_layers": 1, **overrides})


KINDS = {
    "chunk": save_chunked,
    "LoopLM": lambda path: save_looplm(path, max_loops=8, num_hidden_layers=1),
}
BOTH, MELT = on(*KINDS, fixture="drafting"), on("chunk", fixture="drafting")


@pytest.fixture(scope="module")
def drafting(request, tmp_path_factory):
    """Serve one of `KINDS` with drafts; in the end some must have been accepted, and some rejected."""
    path = tmp_path_factory.mktemp("drafting")
    model = KINDS[request.param](path)
    save_tokenizer(path)
    # Where one request is within n tokens of the most, vLLM gives all of them n drafts of zeros: right, and slow.
    room = {"max_num_seqs": 8, "max_model_len": MAX_LENGTH + CHUNK}
    with engine(path, **{**LIMITS, **room}, speculative_config=NGRAMS) as llm:
        live = Server(llm, model)
        yield live
    played = live.counts  # nothing where another process plays the scenes
    assert not played or all(played[name] for name in ("preempted", "hit", "accepted", "rejected")), played


@contextmanager
def proposed(llm: LLM, guess: Callable[[list[int]], Sequence[int]]) -> Iterator[Counter]:
    """Draft what `guess` makes of a request's tokens so far, in place of n-grams; count as `counted` does."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def propose(*of_step, slot_mappings=None):
        *_, sampled, lengths, tokens = of_step  # n-grams are told first how many there may be
        most = runner.num_spec_tokens
        return [[*guess(tokens[row, : lengths[row]].tolist())][:most] if new else [] for row, new in enumerate(sampled)]

    assert llm.reset_prefix_cache()
    runner.drafter.propose = propose
    try:
        with counted(scheduler_of(llm)) as counts:
            yield counts
    finally:
        del runner.drafter.propose


class Guesses:
    """Drafts for answers that are known, of which the first few are right; wrong ones where an answer is another.

    Attributes:
        right: how many, for a request that has so many tokens.
    """

    def __init__(self, asked, answers, right: Callable[[int], int] = lambda length: VOCABULARY):
        self.whole = [[*prompt, *answer.token_ids] for prompt, answer in zip(asked, answers, strict=True)]
        self.right = right

    def __call__(self, tokens: list[int]) -> list[int]:
        (follows, *_) = (*(each[len(tokens) :] for each in self.whole if each[: len(tokens)] == tokens), tokens)
        right = self.right(len(tokens))
        return [*follows[:right], *((token + 1) % VOCABULARY for token in follows[right:])]


def none(tokens):
    return []


@BOTH
@plays(FEW)
def test_no_scene_changes_an_answer(drafting, scene, monkeypatch):
    few = [4] * 9  # drafts, by batch size
    monkeypatch.setattr(scheduler_of(drafting.llm), "dynamic_sd_lookup", few)
    judge(drafting, scene)


@BOTH
def test_answers_are_those_of_the_same_engine_without_drafts(drafting):
    """Drafts that are right, wrong, or right up to some place, of requests whose prompts end around the cuts."""
    llm, model = drafting.llm, drafting.model
    asked = prompts(*AROUND_CUTS)
    with proposed(llm, none) as counts:
        plain = generate(llm, asked, max_tokens=70)
    assert not counts["accepted"] + counts["rejected"]
    for right in (lambda length: VOCABULARY, lambda length: 0, lambda length: length % 7):
        with proposed(llm, Guesses(asked, plain, right)) as counts:
            drafted = generate(llm, asked, max_tokens=70)
        assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
        assert distance(model, asked, drafted) <= RIGHT
        assert counts["accepted"] > 200 or right(8) == 0
        assert counts["rejected"] > 200 or right(8) > 8


@BOTH
def test_mixed_depths_exits_and_contrasts_keep_their_meaning_and_usage_counts_them(drafting):
    llm, model = drafting.llm, drafting.model
    asked = prompts(*LENGTHS)
    for exits in (None, EXITS):
        with proposed(llm, none):
            plain = generate(llm, asked, DEPTHS, exits, CONTRASTS, max_tokens=40)
        with proposed(llm, Guesses(asked, plain, lambda length: length % 7)) as counts:
            drafted = generate(llm, asked, DEPTHS, exits, CONTRASTS, max_tokens=40)
        assert counts["accepted"] > 50
        assert distance(model, asked, drafted, DEPTHS, exits, CONTRASTS) <= RIGHT

        told = {}
        with proposed(llm, none):
            plain = generate(llm, asked, DEPTHS, exits, max_tokens=40)
        with proposed(llm, Guesses(asked, plain)):  # answers end among drafts that are right
            for number, (prompt, loops) in enumerate(zip(asked, DEPTHS, strict=True)):
                depth = {"loops": loops, "exit_threshold": 1.0 if exits is None else exits[number]}
                parameters = everything(35, extra_args=depth)
                llm.llm_engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), parameters)
            while llm.llm_engine.has_unfinished_requests():
                told |= {int(each.request_id): each for each in llm.llm_engine.step()}
        for number, (prompt, loops) in enumerate(zip(asked, DEPTHS, strict=True)):
            answer, threshold = told[number].outputs[0], 1.0 if exits is None else exits[number]
            ran = loops_run(model, prompt, answer, loops, threshold)[len(prompt) - 1 :].tolist()
            assert told[number].kv_transfer_params["melt_loops_run"] == dict(Counter(ran)) and len(ran) == 35


@BOTH
def test_a_seed_draws_what_it_would_without_drafts_also_beside_requests_that_have_some(drafting):
    llm, asked = drafting.llm, prompts(10, 70, 33)

    def draw(seed, guess):
        for number, (prompt, own) in enumerate(zip(asked, (seed, seed, None), strict=True)):
            parameters = everything(40, temperature=1, seed=own, logprobs=None)
            llm.llm_engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), parameters)
        told = {}
        with proposed(llm, guess) as counts:
            while llm.llm_engine.has_unfinished_requests():
                told |= {each.request_id: each.outputs[0].token_ids for each in llm.llm_engine.step()}
        return [told["0"], told["1"]], counts["rejected"]

    plain, rejected = draw(7, none)
    assert not rejected
    drafted, rejected = draw(7, lambda tokens: tokens[:9])
    assert drafted == plain and rejected > 100
    assert all(ours != other for ours, other in zip(plain, draw(8, none)[0], strict=True))


@BOTH
def test_what_each_token_ran_is_not_told(drafting):
    with pytest.raises(VLLMValidationError, match="return_loops does not tell tokens that were drafted"):
        generate(drafting.llm, prompts(5), told=True)


@MELT
def test_drafts_that_would_fill_a_chunk_at_once_leave_one_out(drafting, monkeypatch):
    """C = n + 1, all rejected, after a prompt of whole chunks: its first open rows are of a step with drafts."""
    llm, model = drafting.llm, drafting.model
    asked = prompts(2 * CHUNK)
    with proposed(llm, none):
        plain = generate(llm, asked, max_tokens=40)
    wrong = Guesses(asked, plain, lambda length: 0)
    with proposed(llm, wrong) as counts:
        assert distance(model, asked, generate(llm, asked, max_tokens=40)) <= RIGHT
    assert counts["rejected"] >= CHUNK - 2
    monkeypatch.setattr(scheduler_module, "tokens_in_step", lambda *args, drafted: tokens_in_step(*args, drafted=False))
    with proposed(llm, wrong):
        assert distance(model, asked, generate(llm, asked, max_tokens=40)) > WRONG


@MELT
@pytest.mark.parametrize("right", [0, VOCABULARY], ids=["rejected", "accepted"])
def test_drafts_that_would_cross_a_cut_are_left_out(drafting, monkeypatch, right):
    llm, model = drafting.llm, drafting.model
    asked = prompts(50)
    with proposed(llm, none):
        plain = generate(llm, asked, max_tokens=70)
    guesses = Guesses(asked, plain, lambda length: right)
    with proposed(llm, guesses):
        assert distance(model, asked, generate(llm, asked, max_tokens=70)) <= RIGHT
    whole = tokens_in_step

    def anywhere(start, wanted, *args, drafted):
        return wanted if drafted else whole(start, wanted, *args)

    monkeypatch.setattr(scheduler_module, "tokens_in_step", anywhere)
    with proposed(llm, guesses):
        assert distance(model, asked, generate(llm, asked, max_tokens=70)) > WRONG


@BOTH
@pytest.mark.parametrize("right", [0, 5, VOCABULARY])
def test_a_conversation_finds_the_chunks_that_drafts_have_closed(drafting, right):
    llm, model = drafting.llm, drafting.model
    (first,) = prompts(40)
    with proposed(llm, none):
        (plain,) = generate(llm, [first], max_tokens=60)
    with proposed(llm, Guesses([first], [plain], lambda length: right)) as counts:
        (answer,) = generate(llm, [first], max_tokens=60)
        llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.propose = lambda *_, **__: [[]]
        conversation = [*first, *answer.token_ids, 7, 8, 9]
        assert distance(model, [conversation], generate(llm, [conversation])) <= RIGHT
    assert counts["hit"] == 96 and counts["accepted" if right else "rejected"] > 30


@on("LoopLM", fixture="drafting")
def test_a_lone_token_runs_without_drafts_of_nobody(drafting, monkeypatch):
    """Such placeholders would be computed in vain, and their room would be waited for."""
    llm, live = drafting.llm, drafting.llm.llm_engine
    scheduler = scheduler_of(llm)
    schedule, scheduled = scheduler.schedule, []

    def noting(*args):
        output = schedule(*args)
        scheduled.append({key: list(drafts) for key, drafts in output.scheduled_spec_decode_tokens.items()})
        return output

    def placeholders():
        scheduled.clear()
        live.add_request("long", {"prompt_token_ids": prompts(9)[0]}, everything(max_tokens=12))
        for step in range(12):
            if step == 6:
                live.add_request("lone", {"prompt_token_ids": [1]}, everything(max_tokens=1))
            live.step()
        assert not live.has_unfinished_requests() and any(scheduled)
        return sum(-1 in drafts for step in scheduled for drafts in step.values())

    monkeypatch.setattr(scheduler, "schedule", noting)
    with proposed(llm, lambda tokens: [*tokens[:2], VOCABULARY - 1]):
        assert not placeholders()
        monkeypatch.setattr(scheduler, "dynamic_sd_lookup", None)
        assert placeholders()
