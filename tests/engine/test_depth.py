"""Loops per request: mixed in a batch, each equals the reference at its depth; work is saved, rows are kept apart."""

import numpy as np
import pytest
import torch
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends import cpu_attn

from melt_serve.engine import scheduler
from tests.engine.engines import (
    DEPTHS,
    EXITS,
    LENGTHS,
    RIGHT,
    WRONG,
    distance,
    distance_at_mixed_depths,
    engine,
    everything,
    generate,
    on,
    prompts,
    save_melt,
    scheduler_of,
)
from tests.engine.scenes import counted
from tests.engine.waits import watched

MODES = on("token", "chunk")


@MODES
def test_requests_of_mixed_depths_equal_the_reference_each_at_its_own(served):
    assert distance_at_mixed_depths(*served) <= RIGHT


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ({"chunk_size": 64, "kv_gate_type": "mean"}, {}),
        (
            {"kv_gate_initial_state": "zeros", "num_key_value_heads": 1},
            {"max_num_batched_tokens": 72, "max_num_seqs": 8},
        ),
    ],
    ids=["mean", "small steps"],
)
def test_so_they_do_with_other_gates_and_in_small_steps(tmp_path, mode, checkpoint, options):
    model = save_melt(tmp_path, decode_mode=mode, **checkpoint)
    with engine(tmp_path, **options) as llm:
        assert distance_at_mixed_depths(llm, model) <= RIGHT


@MODES
def test_loops_that_are_not_run_are_not_paid(served):
    """Count the tokens that pass through a layer: as many as the loops of all tokens together."""
    llm, model = served
    asked, passed = prompts(*LENGTHS), []
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layer = runner.model.model.layers[0].mlp.down_proj
    hook = layer.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))
    try:
        generate(llm, asked, DEPTHS, max_tokens=5)
        tokens = [len(prompt) + 5 - 1 for prompt in asked]
        assert sum(passed) == sum(own * loops for own, loops in zip(tokens, DEPTHS, strict=True))
        passed.clear()
        assert llm.reset_prefix_cache()
        outputs = generate(llm, asked, DEPTHS, EXITS, max_tokens=5)
    finally:
        hook.remove()
    ran = [loops_run(model, *each).tolist() for each in zip(asked, outputs, DEPTHS, EXITS, strict=True)]
    assert sum(passed) == sum(map(sum, ran))
    assert len({loops for each in ran for loops in each}) >= 6, "exits must come at many loops, or this shows little"


def builder_of(llm):
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return runner.model.model.layers[0].self_attn.attn.attn_backend.get_builder_cls()


@MODES
def test_nor_do_gaps_change_answers_where_attention_bridges_them_as_on_a_gpu(served, monkeypatch):
    monkeypatch.setattr(builder_of(served.llm), "bridges_gaps", True)
    assert distance_at_mixed_depths(*served) <= RIGHT


@MODES
@pytest.mark.parametrize("bridge", [True, False], ids=["bridged", "cut"])
def test_attention_over_gaps_reads_a_request_once_a_loop_or_cut_there_computes_no_query_in_vain(
    served, monkeypatch, bridge
):
    """Count what the kernel gets: the queries and the rows of each sequence."""
    llm, model = served
    asked, got = prompts(203), []
    kernel = cpu_attn.ops.cpu_attention_with_kv_cache

    def count(**arguments):
        got.append((arguments["query_start_loc"].diff().tolist(), arguments["seq_lens"].tolist()))
        return kernel(**arguments)

    assert not builder_of(llm).bridges_gaps
    monkeypatch.setattr(builder_of(llm), "bridges_gaps", bridge)
    monkeypatch.setattr(cpu_attn.ops, "cpu_attention_with_kv_cache", count)
    with watched() as steps:
        outputs = generate(llm, asked, 8, 0.85, max_tokens=1)
    assert distance(model, asked, outputs, 8, 0.85) <= RIGHT
    expected, cuts = [], 0
    for each in steps:
        (end,) = each.plan.sequences.ends.tolist()
        ran = each.plan.ran
        for loop in range(1, max(ran) + 1):
            (running,) = np.nonzero(ran >= loop)
            runs = np.split(running, np.flatnonzero(np.diff(running) > 1) + 1)
            cuts += len(runs) - 1
            sequences = [running] if bridge else runs
            queries = [int(tokens[-1] - tokens[0]) + 1 for tokens in sequences]
            rows = [int(tokens[-1]) + 1 + end - len(ran) for tokens in sequences]
            expected += [(queries, rows)] * len(model.model.layers)
    assert got == expected
    assert cuts >= 10, "exits must scatter, or this shows little"


@torch.no_grad()
def loops_run(model, prompt, output, loops, threshold):
    """Return how many loops the reference runs for each token: [tokens that ran]."""
    tokens = torch.tensor([[*prompt, *output.token_ids[:-1]]])
    lengths = torch.tensor([len(prompt)])  # of use in `token` mode
    return model(tokens, loops=loops, exit_threshold=threshold, prompt_lengths=lengths).depths[0]


@MODES
def test_the_prefix_cache_knows_depth(served, monkeypatch):
    llm, model = served
    asked = prompts(100)
    for loops, threshold, found in ((2, 1.0, 0), (4, 1.0, 0), (2, 1.0, 96), (4, 0.9, 0), (4, 1.0, 96), (4, 0.9, 96)):
        with counted(scheduler_of(llm)) as counts:
            outputs = generate(llm, asked, loops, threshold)
        assert distance(model, asked, outputs, loops, threshold) <= RIGHT
        assert counts["hit"] == found
    assert llm.reset_prefix_cache()
    monkeypatch.setattr(scheduler, "salt_with_depth", lambda request, depth: None)
    generate(llm, asked, loops=2)
    assert distance(model, asked, generate(llm, asked, loops=4), loops=4) > WRONG


@on("token")
def test_a_users_own_salt_still_parts_requests(served):
    (prompt,) = prompts(100)
    for salt, found in (("a", 0), ("b", 0), ("a", 96), (None, 0)):
        asked = TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": salt} if salt else {}))
        (output,) = served.llm.generate(asked, everything(1), use_tqdm=False)
        assert output.num_cached_tokens == found


@on("token")
@pytest.mark.parametrize("loops", [0, 9, -1, "2", 1.5, True, None])
def test_loops_outside_the_checkpoints_range_are_refused_and_the_engine_lives_on(served, loops):
    with pytest.raises(VLLMValidationError, match="from 1 to 8"):
        generate(served.llm, prompts(5), extra_args={"loops": loops})
    assert len(generate(served.llm, prompts(40))[0].token_ids) == 8


@on("token")
@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, "0.5", True, None, float("nan")])
def test_thresholds_that_are_no_probability_are_refused_and_the_engine_lives_on(served, threshold):
    with pytest.raises(VLLMValidationError, match="above 0 and at most 1"):
        generate(served.llm, prompts(5), extra_args={"exit_threshold": threshold})
    assert len(generate(served.llm, prompts(40))[0].token_ids) == 8


@on("token")
def test_an_effort_nobody_defined_is_refused(served):
    for effort in ("hardest", ["low"], 1):
        with pytest.raises(VLLMValidationError, match="reasoning_effort must be one of none, minimal, low"):
            generate(served.llm, prompts(5), extra_args={"reasoning_effort": effort})
