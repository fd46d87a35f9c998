"""The engine equals the reference model: prefill and decode, over loops, chunks, gates, heads, dtypes and ranks."""

import copy

import pytest
import torch

from tests.engine.engines import (
    GENERATED,
    distance,
    engine,
    engine_logprobs,
    generate,
    prompts,
    reference_logprobs,
    save_melt,
)

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100, 203)
FLOAT32 = 1e-4


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_float32_equals_the_reference_at_every_depth(tmp_path, loops):
    model = save_melt(tmp_path)
    with engine(tmp_path, hf_overrides={"total_ut_steps": loops}) as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            assert distance(model, prompt, output, loops) <= FLOAT32, f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize(
    "overrides",
    [
        {"kv_gate_type": "scalar"},
        {"kv_gate_type": "mean"},
        {"kv_gate_type": "ema"},
        {"kv_gate_type": "last"},
        {"kv_gate_initial_state": "zeros"},
        {"kv_gate_initial_state": "zeros", "kv_gate_type": "ema"},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "num_hidden_layers": 3, "rope_theta": 1e6},
        {"chunk_size": 1},
        {"chunk_size": 24},
        {"chunk_size": 512},
    ],
    ids=lambda overrides: ",".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_float32_equals_the_reference_for_every_kind_of_checkpoint(tmp_path, overrides):
    model = save_melt(tmp_path, **overrides)
    lengths = (1, 24, 33, 71)
    with engine(tmp_path) as llm:
        for prompt, output in zip(prompts(*lengths), generate(llm, prompts(*lengths)), strict=True):
            assert distance(model, prompt, output, loops=4) <= FLOAT32, f"prompt of {len(prompt)} tokens"


def test_a_reference_with_other_chunks_is_far_away(tmp_path):
    model = save_melt(tmp_path)
    (prompt,) = prompts(100)
    with engine(tmp_path) as llm:
        (output,) = generate(llm, [prompt])
    model.config.chunk_size = 64
    assert distance(model, prompt, output, loops=4) > 1e-2


def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(tmp_path):
    model = save_melt(tmp_path)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    ours, theirs, agreed = [], [], []
    with engine(tmp_path, dtype="bfloat16") as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            exact = reference_logprobs(model, prompt, output.token_ids, loops=4)
            reference = reference_logprobs(rounded, prompt, output.token_ids, loops=4)
            served = engine_logprobs(output)
            ours.append((served - exact).abs().mean())
            theirs.append((reference - exact).abs().mean())
            best = exact.topk(2).values
            clear = best[:, 0] - best[:, 1] > 0.25
            agreed.append((served.argmax(-1) == exact.argmax(-1))[clear])
    assert torch.stack(ours).mean() <= 1.5 * torch.stack(theirs).mean()
    assert torch.cat(agreed).all() and len(torch.cat(agreed)) > GENERATED


def test_tensor_parallel_two_equals_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_melt(tmp_path)
    with engine(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            assert distance(model, prompt, output, loops=4) <= FLOAT32, f"prompt of {len(prompt)} tokens"


def test_compiled_equals_the_reference(tmp_path):
    model = save_melt(tmp_path, num_hidden_layers=1)
    with engine(tmp_path, enforce_eager=False, hf_overrides={"total_ut_steps": 3}) as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            assert distance(model, prompt, output, loops=3) <= FLOAT32, f"prompt of {len(prompt)} tokens"
