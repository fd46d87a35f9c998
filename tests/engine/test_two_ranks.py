"""Engines on two ranks (`--tensor-parallel-size 2`) equal the reference, at every depth, with adapters and under load.

Each rank is a process with a core of its own, so these tests run alone.
"""

import pytest

from tests.engine.adapters import EVERY_LAYER, THE_GATE, distance_with_two
from tests.engine.engines import (
    ADAPTERS,
    AROUND_CUTS,
    RIGHT,
    distance,
    distance_at_mixed_depths,
    engine,
    generate,
    on,
    prompts,
    save_looplm,
    save_melt,
)
from tests.engine.random_scenes import FEW, judge, plays
from tests.engine.scenes import LIMITS, Server, save_tokenizer

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
KINDS = {
    "one KV head": (save_melt, {"num_key_value_heads": 1}, ADAPTERS),  # both ranks hold it
    "four KV heads": (save_melt, {"num_key_value_heads": 4}, ADAPTERS),
    "chunk": (save_melt, {"decode_mode": "chunk"}, {}),
    "merged matmuls": (save_melt, {}, {"worker_extension_cls": "tests.engine.plain_weights.PlainWeights"}),
    "LoopLM": (save_looplm, {}, {}),
}
"""Checkpoints, and options of their engines."""
MELTS = ("one KV head", "four KV heads", "chunk")


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    save, checkpoint, options = KINDS[request.param]
    path = tmp_path_factory.mktemp("served")
    model = save(path, **checkpoint)
    save_tokenizer(path)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with engine(path, **LIMITS, **options, **TWO_RANKS) as llm:
            live = Server(llm, model)
            yield live
    if live.counts:
        assert live.counts["preempted"] and live.counts["hit"] and live.counts["passed over"], live.counts


@on(*MELTS, fixture="server")
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_every_depth_equals_the_reference(server, loops):
    asked = prompts(*AROUND_CUTS)
    assert distance(server.model, asked, generate(server.llm, asked, loops), loops) <= RIGHT


@on("LoopLM", fixture="server")
def test_a_looplm_equals_the_reference(server):
    asked = prompts(*AROUND_CUTS)
    assert distance(server.model, asked, generate(server.llm, asked)) <= RIGHT


@on(*MELTS, fixture="server")
def test_requests_of_mixed_depths_equal_the_reference_each_at_its_own(server):
    assert distance_at_mixed_depths(server.llm, server.model) <= RIGHT


@on("merged matmuls", fixture="server")
def test_merged_matmuls_equal_the_reference(server):
    """W_Q is split over the ranks, and W_z beside it is not."""
    assert server.llm.collective_rpc("has_merged") == [True, True]
    assert distance_at_mixed_depths(server.llm, server.model) <= RIGHT


@on("one KV head", "four KV heads", fixture="server")
def test_an_adapter_equals_the_reference_with_it_merged_in(server, tmp_path):
    assert distance_with_two(server.llm, server.model, tmp_path, EVERY_LAYER + THE_GATE) <= RIGHT


@on("one KV head", "chunk", fixture="server")
@plays(FEW)
def test_no_scene_changes_an_answer(server, scene):
    judge(server, scene)
