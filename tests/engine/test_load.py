"""Outputs never depend on load: random scenes on the real engine, held against the reference model.

Every answer of every scene must equal the reference's log-probabilities for its own tokens, whatever else
went on: so it equals what the same request gets alone, cold or warm, in any order and in any amount of room.

`--hypothesis-profile=long` plays many more scenes than the bounded number of a usual run.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from tests.engine.engines import engine, engine_logprobs, generate, reference_logprobs, save_melt
from tests.engine.scenes import MAX_LENGTH, Ask, Scene, play
from tests.requires import needs_fp8_rows

FLOAT32 = 1e-4
LOOPS, MAX_LOOPS = 4, 6


class Server:
    """A live engine with its reference, and what has happened on it."""

    def __init__(self, llm, model):
        self.llm, self.model, self.counts = llm, model, Counter()

    def furthest(self, scene: Scene) -> float:
        """Play the scene; the largest difference in log-probability between any answer and the reference."""
        played = play(self.llm, scene)
        self.counts.update(played.counts)
        assert len(played.answers) == sum(ask.n for ask in scene.asks)
        distances = []
        for (number, index), answer in played.answers.items():
            ask = scene.asks[number]
            exits = {"exit_threshold": ask.exit_threshold}
            expected = reference_logprobs(
                self.model, played.prompts[number], answer.token_ids, ask.loops or LOOPS, **exits
            )
            distances.append((engine_logprobs(answer) - expected).abs().max().item())
            note(f"request {number}.{index}: {distances[-1]:.1e}")
        return max(distances)


PRIORITIES = {"scheduling_policy": "priority"}
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
KINDS = {
    "token": ({"chunk_size": 32}, {}),
    "token, by priority": ({"chunk_size": 32}, PRIORITIES),
    "token, blocks of a third of a chunk": ({"chunk_size": 96}, {}),
    "token, chunks that no block divides": ({"chunk_size": 48}, {}),
    "token, two ranks": ({"chunk_size": 32}, TWO_RANKS),
    "chunk": ({"decode_mode": "chunk", "chunk_size": 32}, {}),
    "chunk, by priority": ({"decode_mode": "chunk", "chunk_size": 32}, PRIORITIES),
    "chunk of two blocks": ({"decode_mode": "chunk", "chunk_size": 64}, {}),
    "chunk, two ranks": ({"decode_mode": "chunk", "chunk_size": 32}, TWO_RANKS),
}
"""Checkpoints and engines that scenes are played on."""


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.replace(", ", "-").replace(" ", "-"))
def server(request, tmp_path_factory):
    checkpoint, options = KINDS[request.param]
    path = tmp_path_factory.mktemp("melt")
    model = save_melt(path, **checkpoint, total_ut_steps=LOOPS, max_loops=MAX_LOOPS, num_hidden_layers=1)
    limits = {"max_model_len": MAX_LENGTH, "max_num_batched_tokens": 512, "max_num_seqs": 6, "block_size": 32}
    with pytest.MonkeyPatch.context() as environment:
        if "tensor_parallel_size" in options:
            environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with engine(path, **limits, **options) as llm:
            live = Server(llm, model)
            yield live
    assert live.counts["preempted"] and live.counts["hit"] and live.counts["passed over"], live.counts


def near_multiples() -> st.SearchStrategy[int]:
    """Lengths around the multiples of chunks and blocks, where cuts and shares begin and end."""
    around = st.builds(lambda of, off: max(0, 32 * of + off), st.integers(0, 6), st.integers(-2, 2))
    return around | st.integers(0, 200)


asks = st.builds(
    Ask,
    arrives=st.integers(0, 30),
    document=st.integers(0, 1),
    shared=near_multiples(),
    own=st.integers(1, 70),
    answer=st.integers(1, 70),
    continues=st.none() | st.integers(0, 4),
    seed=st.none() | st.integers(0, 3),
    n=st.sampled_from((1, 1, 1, 2)),
    loops=st.none() | st.integers(1, MAX_LOOPS),
    exit_threshold=st.sampled_from((1.0, 1.0, 1.0, 0.6, 0.85)),
    priority=st.integers(0, 2),
)
scenes = st.builds(
    Scene,
    asks=st.lists(asks, min_size=1, max_size=6).map(tuple),
    budget=st.integers(96, 512) | st.sampled_from((96, 97, 102, 128)),
    spare_blocks=st.none() | st.integers(0, 5),
    warm=st.booleans(),
    ahead=st.booleans(),
)


CROWD = tuple(Ask(arrives=i, document=0, shared=200, own=20 + i, answer=90, n=1 + i % 2) for i in range(6))
TALK = tuple(Ask(arrives=20 * i, document=1, shared=90, own=9, answer=40, continues=i - 1) for i in range(5))

DEPTHS = tuple(replace(ask, loops=(6, 1, 3)[i % 3], exit_threshold=(1, 0.7)[i % 2]) for i, ask in enumerate(CROWD))


@settings(suppress_health_check=list(HealthCheck))
@given(scene=scenes)
@example(scene=Scene(CROWD, budget=97, spare_blocks=0))
@example(scene=Scene(CROWD, spare_blocks=2, ahead=True))
@example(scene=Scene(DEPTHS, budget=128, spare_blocks=2))
@example(scene=Scene(TALK, spare_blocks=0))
def test_no_scene_changes_an_answer(server, scene):
    assert server.furthest(scene) <= FLOAT32


@needs_fp8_rows
@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_with_fp8_rows_an_answer_is_what_it_is_alone(tmp_path, mode):
    """The reference has no FP8 rows; the same engine, cold and with one prompt at a time, stands in for it."""
    save_melt(tmp_path, decode_mode=mode, num_hidden_layers=1)
    limits = {"max_model_len": MAX_LENGTH, "max_num_batched_tokens": 512, "max_num_seqs": 6, "block_size": 32}
    crowd = tuple(replace(ask, n=1, seed=ask.arrives % 2 or None) for ask in CROWD)
    with engine(tmp_path, kv_cache_dtype="fp8", **limits) as llm:
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
                torch.testing.assert_close(engine_logprobs(crowded), engine_logprobs(alone), atol=FLOAT32, rtol=0)
