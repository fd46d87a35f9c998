"""Loops per request: mixed in a batch, each equals the reference at its depth; work is saved, rows are kept apart."""

import pytest
import torch
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError

from melt_serve.engine.scheduler import ChunkGridScheduler
from tests.engine.engines import distance, engine, everything, generate, prompts, save_melt

LENGTHS = (1, 31, 32, 33, 64, 65, 100, 203)
DEPTHS = (1, 4, 8, 2, 4, 1, 3, 8)
EXITS = (1.0, 0.5, 0.85, 1.0, 0.7, 0.3, 0.6, 0.9)
RIGHT, WRONG = 1e-4, 1e-2
MODES = pytest.mark.parametrize("mode", ["token", "chunk"])
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def at_depths(llm, asked, depths, exits=None, tokens=40):
    """Every prompt with loops and a threshold of its own, all in one batch."""
    sampling = [
        everything(tokens, extra_args={"loops": loops, "exit_threshold": threshold})
        for loops, threshold in zip(depths, exits or [1.0] * len(depths), strict=True)
    ]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked], sampling, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def furthest(model, asked, outputs, depths, exits=None):
    each = zip(asked, outputs, depths, exits or [1.0] * len(depths), strict=True)
    return max(distance(model, prompt, output, loops, exit_threshold=q) for prompt, output, loops, q in each)


KINDS = pytest.mark.parametrize(
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


@MODES
@KINDS
def test_requests_of_mixed_depths_equal_the_reference_each_at_its_own(tmp_path, monkeypatch, mode, checkpoint, options):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if options is TWO_RANKS else "auto")
    model = save_melt(tmp_path, decode_mode=mode, **checkpoint)
    asked = prompts(*LENGTHS)
    with engine(tmp_path, **options) as llm:
        assert furthest(model, asked, at_depths(llm, asked, DEPTHS), DEPTHS) <= RIGHT
        assert furthest(model, asked, at_depths(llm, asked, DEPTHS, EXITS), DEPTHS, EXITS) <= RIGHT


@MODES
def test_loops_that_are_not_run_are_not_paid(tmp_path, mode):
    """Tokens that pass through a layer: as many as tokens of requests have loops of their own."""
    model = save_melt(tmp_path, decode_mode=mode)
    asked, passed = prompts(*LENGTHS), []
    with engine(tmp_path) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        layer = runner.model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))
        at_depths(llm, asked, DEPTHS, tokens=5)
        tokens = [len(prompt) + 5 - 1 for prompt in asked]
        assert sum(passed) == sum(own * loops for own, loops in zip(tokens, DEPTHS, strict=True))
        passed.clear()
        assert llm.reset_prefix_cache()
        outputs = at_depths(llm, asked, DEPTHS, EXITS, tokens=5)
    ran = [loops_run(model, *each).tolist() for each in zip(asked, outputs, DEPTHS, EXITS, strict=True)]
    assert sum(passed) == sum(map(sum, ran))
    assert len({loops for each in ran for loops in each}) >= 6, "exits must come at many loops, or this shows little"


@torch.no_grad()
def loops_run(model, prompt, output, loops, threshold):
    """[tokens that ran], by the reference."""
    tokens = torch.tensor([[*prompt, *output.token_ids[:-1]]])
    by_token = {"prompt_lengths": torch.tensor([len(prompt)])} if model.config.decode_mode == "token" else {}
    return model(tokens, loops=loops, exit_threshold=threshold, **by_token).depths[0]


@MODES
def test_the_prefix_cache_knows_depth(tmp_path, mode, monkeypatch):
    model = save_melt(tmp_path, decode_mode=mode)
    (prompt,) = prompts(100)

    def hits(llm):
        return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")

    with engine(tmp_path) as llm:
        for loops, threshold, found in ((2, 1, 0), (4, 1, 0), (2, 1, 96), (4, 0.9, 0), (4, 1, 96), (4, 0.9, 96)):
            before = hits(llm)
            outputs = at_depths(llm, [prompt], [loops], [threshold])
            assert furthest(model, [prompt], outputs, [loops], [threshold]) <= RIGHT
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


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, "0.5", True, None, float("nan")])
def test_thresholds_that_are_no_probability_are_refused_and_the_engine_lives_on(llm, threshold):
    with pytest.raises(VLLMValidationError, match="above 0 and at most 1"):
        generate(llm, prompts(5), extra_args={"exit_threshold": threshold})
    assert len(generate(llm, prompts(40))[0].token_ids) == 8


def test_an_effort_nobody_defined_is_refused(llm):
    for effort in ("hardest", ["low"], 1):
        with pytest.raises(VLLMValidationError, match="reasoning_effort must be one of none, minimal, low"):
            generate(llm, prompts(5), extra_args={"reasoning_effort": effort})


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("melt")
    save_melt(path)
    with engine(path) as live:
        yield live
