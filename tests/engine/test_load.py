"""Outputs never depend on load: random scenes on the real engine, held against the reference model.

Every answer of every scene must equal the reference's log-probabilities for its own tokens, whatever else
went on: so it equals what the same request gets alone, cold or warm, in any order and in any amount of room. Among the
requests are some with adapters, penalties and grammars, and some that are cancelled.

`--hypothesis-profile=long` plays many more scenes than the bounded number of a usual run.
"""

from dataclasses import replace

import pytest
import torch

from tests.engine.adapters import EVERY_LAYER, THE_GATE, save_adapter
from tests.engine.engines import ADAPTERS, RIGHT, engine, engine_logprobs, generate, on, save_melt
from tests.engine.random_scenes import EVERY_RUN, FEW, MAX_LOOPS, judge, plays
from tests.engine.scenes import CROWD, LIMITS, MAX_LENGTH, TALK, Scene, Server, play, save_tokenizer
from tests.requires import needs_fp8_rows

PRIORITIES = {"scheduling_policy": "priority"}
KINDS = {
    "token": ({"chunk_size": 32}, ADAPTERS),
    "token, by priority": ({"chunk_size": 32}, PRIORITIES),
    "token, blocks of a third of a chunk": ({"chunk_size": 96}, {}),
    "token, chunks that no block divides": ({"chunk_size": 48}, {}),
    "chunk": ({"decode_mode": "chunk", "chunk_size": 32}, ADAPTERS),
    "chunk, by priority": ({"decode_mode": "chunk", "chunk_size": 32}, PRIORITIES),
    "chunk of two blocks": ({"decode_mode": "chunk", "chunk_size": 64}, {}),
}
"""Checkpoints and engines that scenes are played on."""


@pytest.fixture
def server(request, tmp_path):
    checkpoint, options = KINDS[request.param]
    model = save_melt(tmp_path, **checkpoint, max_loops=MAX_LOOPS, num_hidden_layers=1)
    save_tokenizer(tmp_path)
    adapters = (
        [save_adapter(tmp_path, model, EVERY_LAYER + THE_GATE, seed) for seed in range(3)]
        if options is ADAPTERS
        else ()
    )
    with engine(tmp_path, **LIMITS, **options) as llm:
        live = Server(llm, model, adapters)
        yield live
    assert live.counts["preempted"] and live.counts["hit"] and live.counts["passed over"], live.counts


PRINCIPAL = ("token", "chunk")
OTHERS = [kind for kind in KINDS if kind not in PRINCIPAL]


@on(*PRINCIPAL, fixture="server")
@plays(EVERY_RUN)
def test_no_scene_changes_an_answer(server, scene):
    judge(server, scene)


@on(*OTHERS, fixture="server")
@plays(FEW)
def test_nor_does_one_where_priorities_or_other_blocks_and_chunks_come_in(server, scene):
    judge(server, scene)


@needs_fp8_rows
@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_with_fp8_rows_an_answer_is_what_it_is_alone(tmp_path, mode):
    """The reference has no FP8 rows; the same engine, cold and with one prompt at a time, stands in for it."""
    save_melt(tmp_path, decode_mode=mode, num_hidden_layers=1)
    save_tokenizer(tmp_path)
    crowd = tuple(replace(ask, n=1, seed=ask.arrives % 2 or None) for ask in CROWD)
    with engine(tmp_path, kv_cache_dtype="fp8", **LIMITS) as llm:
        for scene in (Scene(crowd, budget=97, spare_blocks=0), Scene(crowd, warm=True, ahead=True), Scene(TALK)):
            played = play(llm, scene)
            for number, prompt in played.prompts.items():
                ask = scene.asks[number]
                assert llm.reset_prefix_cache()
                (alone,) = generate(
                    llm,
                    [prompt],
                    max_tokens=min(ask.answer, MAX_LENGTH - len(prompt)),
                    temperature=float(ask.seed is not None),
                    seed=ask.seed,
                )
                crowded = played.answers[number, 0]
                assert crowded.token_ids == alone.token_ids
                torch.testing.assert_close(engine_logprobs(crowded), engine_logprobs(alone), atol=RIGHT, rtol=0)
