"""Loops per request: mixed in a batch, each equals the reference at its depth; work is saved, rows are kept apart."""

import pytest
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError

from melt_serve.engine.scheduler import ChunkGridScheduler
from tests.engine.engines import distance, engine, everything, generate, prompts, save_melt

LENGTHS = (1, 31, 32, 33, 64, 65, 100, 203)
DEPTHS = (1, 4, 8, 2, 4, 1, 3, 8)
RIGHT, WRONG = 1e-4, 1e-2
MODES = pytest.mark.parametrize("mode", ["token", "chunk"])
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def at_depths(llm, asked, depths, tokens=40):
    """Every prompt with loops of its own, all in one batch."""
    sampling = [everything(tokens, extra_args={"loops": loops}) for loops in depths]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked], sampling, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def furthest(model, asked, outputs, depths):
    triples = zip(asked, outputs, depths, strict=True)
    return max(distance(model, prompt, output, loops) for prompt, output, loops in triples)


@MODES
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ({}, {}),
        ({"chunk_size": 64, "kv_gate_type": "mean"}, {}),
        (
            {"kv_gate_initial_state": "zeros", "num_key_value_heads": 1},
            {"max_num_batched_tokens": 72, "max_num_seqs": 8},
        ),
        ({"num_hidden_layers": 1}, {"enforce_eager": False}),
        ({}, TWO_RANKS),
    ],
    ids=["plain", "mean", "small steps", "compiled", "two ranks"],
)
def test_requests_of_mixed_depths_equal_the_reference_each_at_its_own(tmp_path, monkeypatch, mode, checkpoint, options):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if options is TWO_RANKS else "auto")
    model = save_melt(tmp_path, decode_mode=mode, **checkpoint)
    asked = prompts(*LENGTHS)
    with engine(tmp_path, **options) as llm:
        assert furthest(model, asked, at_depths(llm, asked, DEPTHS), DEPTHS) <= RIGHT


@MODES
def test_loops_that_are_not_run_are_not_paid(tmp_path, mode):
    """Tokens that pass through a layer: each request's own loops times its tokens."""
    save_melt(tmp_path, decode_mode=mode)
    asked, passed = prompts(*LENGTHS), []
    with engine(tmp_path) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        layer = runner.model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))
        at_depths(llm, asked, DEPTHS, tokens=5)
    tokens = [len(prompt) + 5 - 1 for prompt in asked]
    assert sum(passed) == sum(own * loops for own, loops in zip(tokens, DEPTHS, strict=True))


@MODES
def test_the_prefix_cache_knows_depth(tmp_path, mode, monkeypatch):
    model = save_melt(tmp_path, decode_mode=mode)
    (prompt,) = prompts(100)

    def hits(llm):
        return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")

    with engine(tmp_path) as llm:
        for loops, found in ((2, 0), (4, 0), (2, 96), (4, 96), (1, 0)):
            before = hits(llm)
            assert furthest(model, [prompt], at_depths(llm, [prompt], [loops]), [loops]) <= RIGHT
            assert hits(llm) - before == found
        assert llm.reset_prefix_cache()
        monkeypatch.setattr(ChunkGridScheduler, "add_request", ChunkGridScheduler.__base__.add_request)
        at_depths(llm, [prompt], [2])
        assert furthest(model, [prompt], at_depths(llm, [prompt], [4]), [4]) > WRONG


def test_a_users_own_salt_still_parts_requests(tmp_path):
    save_melt(tmp_path)
    (prompt,) = prompts(100)
    with engine(tmp_path) as llm:
        for salt, found in (("a", 0), ("b", 0), ("a", 96), (None, 0)):
            asked = TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": salt} if salt else {}))
            (output,) = llm.generate(asked, everything(1), use_tqdm=False)
            assert output.num_cached_tokens == found


@pytest.mark.parametrize("loops", [0, 9, -1, "2", 1.5, True, None])
def test_loops_outside_the_checkpoints_range_are_refused_and_the_engine_lives_on(llm, loops):
    with pytest.raises(VLLMValidationError, match="from 1 to 8"):
        generate(llm, prompts(5), extra_args={"loops": loops})
    assert len(generate(llm, prompts(40))[0].token_ids) == 8


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("melt")
    save_melt(path)
    with engine(path) as live:
        yield live
