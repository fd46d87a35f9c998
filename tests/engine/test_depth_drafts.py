"""Drafts by depth: what the first k loops guess, in rows that are reserved for it, changes no answer."""

from contextlib import contextmanager

import pytest
import torch

from melt_serve.engine.depth_drafts import DRAFTER
from tests.engine.engines import LENGTHS, RIGHT, distance, engine, generate, on, prompts, save_looplm, scheduler_of
from tests.engine.random_scenes import FEW, judge, plays
from tests.engine.scenes import LIMITS, Server, counted, save_tokenizer
from tests.engine.test_drafts import Guesses, none, proposed, save_chunked

AHEAD = 5
DRAFTS = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": AHEAD}
KINDS = {
    "chunk": (save_chunked, 2),
    "chunk of two blocks": (lambda path: save_chunked(path, chunk_size=64), 1),
    "LoopLM": (lambda path: save_looplm(path, max_loops=8, num_hidden_layers=1), 2),
}
"""Checkpoints, and k."""
ALL = on(*KINDS, fixture="drafting")


@pytest.fixture(scope="module")
def drafting(request, tmp_path_factory):
    """Serve one of `KINDS`; in the end some drafts must have been accepted, and some rejected."""
    path = tmp_path_factory.mktemp("drafting")
    save, loops = KINDS[request.param]
    model = save(path)
    save_tokenizer(path)
    options = {**LIMITS, "max_num_seqs": 8, "additional_config": {"draft_loops": loops}}
    with engine(path, **options, speculative_config=DRAFTS) as llm:
        live = Server(llm, model)
        yield live
    played = live.counts  # nothing where another process plays the scenes
    assert not played or all(played[name] for name in ("preempted", "hit", "accepted", "rejected")), played


def drafter_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


@ALL
@plays(FEW)
def test_no_scene_changes_an_answer(drafting, scene):
    judge(drafting, scene)


@ALL
def test_answers_are_those_of_the_same_engine_without_drafts(drafting):
    llm, model = drafting.llm, drafting.model
    asked, depths = prompts(*LENGTHS), (1, 2, 3, 4, 8, 4, 2, 5)
    with proposed(llm, none):
        plain = generate(llm, asked, depths, max_tokens=70)
    with counted(scheduler_of(llm)) as counts:
        drafted = generate(llm, asked, depths, max_tokens=70)
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    assert distance(model, asked, drafted, depths) <= RIGHT
    assert counts["accepted"] and counts["rejected"]


@torch.no_grad()
def continued(model, tokens, loops, count):
    """Return the tokens that the reference of so many loops adds greedily."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), loops=loops).logits[0, -1].argmax()))
    return tokens[-count:]


@ALL
def test_they_are_the_answers_of_the_first_loops(drafting):
    """In the first chunk, where no row of a deeper loop is read; of a request of k loops or fewer there are none."""
    llm, model, drafter = drafting.llm, drafting.model, drafter_of(drafting.llm)
    asked, depths = prompts(3, 9, 12, 5), (4, 8, 3, drafter.loops)
    with proposed(llm, none):
        plain = generate(llm, asked, depths, max_tokens=14)
    told = {}

    def noting(sampled, lengths, tokens, **others):
        drafts = type(drafter).propose(drafter, sampled, lengths, tokens, **others)
        told.update({tuple(tokens[row, : lengths[row]].tolist()): said for row, said in enumerate(drafts)})
        return drafts

    with proposed(llm, Guesses(asked, plain)):
        drafter.propose = noting
        generate(llm, asked, depths, max_tokens=14)
    whole = [[*prompt, *answer.token_ids] for prompt, answer in zip(asked, plain, strict=True)]
    assert len(told) >= 12
    for tokens, drafts in told.items():
        (depth, *_) = (depth for each, depth in zip(whole, depths, strict=True) if tuple(each[: len(tokens)]) == tokens)
        count = AHEAD if depth > drafter.loops else 0
        assert drafts == (continued(model, tokens, drafter.loops, count) if count else [])


@contextmanager
def rows_checked(llm):
    """Yield a list that gets, for every guess of a token, whether all its rows are the request's own."""
    scheduler, drafter, owned = scheduler_of(llm), drafter_of(llm), []
    *_, rows = scheduler.kv_cache_manager.coordinator.single_type_managers
    guess = drafter.guess

    def checking(depths, numbers, tokens, positions):
        for depth, number, position in zip(depths, numbers, positions.tolist(), strict=True):
            blocks = rows.req_to_blocks[drafter.runner.input_batch.req_ids[number]]
            chunk_size = getattr(rows, "chunk_size", None)
            loops = depth.loops - 1 if chunk_size else depth.loops  # those that have rows there
            block = (position % chunk_size if chunk_size else position) // rows.block_size
            owned.append(block * loops + drafter.loops - 1 < len(blocks))
        return guess(depths, numbers, tokens, positions)

    drafter.guess = checking
    try:
        yield owned
    finally:
        del drafter.guess


@ALL
def test_their_rows_are_reserved_before_the_step(drafting, monkeypatch):
    llm, asked = drafting.llm, prompts(*LENGTHS)
    with rows_checked(llm) as owned:
        generate(llm, asked, max_tokens=40)
    assert all(owned) and len(owned) > 100
    monkeypatch.setattr(scheduler_of(llm), "num_lookahead_tokens", 0)
    with rows_checked(llm) as owned:
        generate(llm, asked, max_tokens=40)
    assert not all(owned)
    assert llm.reset_prefix_cache()
