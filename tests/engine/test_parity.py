"""The engine equals the reference model: prefill and decode, over loops, chunks, gates, heads, dtypes and ranks."""

import copy

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from tests.engine.engines import (
    GENERATED,
    VOCABULARY,
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
MODES = pytest.mark.parametrize("mode", ["token", "chunk"])


@MODES
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_float32_equals_the_reference_at_every_depth(tmp_path, loops, mode):
    model = save_melt(tmp_path, decode_mode=mode)
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
        {"kv_gate_rank": 5, "kv_gate_initial_state": "zeros"},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "num_hidden_layers": 3, "rope_theta": 1e6},
        {"chunk_size": 1},
        {"chunk_size": 24},
        {"chunk_size": 512},
        {"decode_mode": "chunk", "kv_gate_initial_state": "zeros", "num_key_value_heads": 4},
        {"decode_mode": "chunk", "kv_gate_type": "last", "num_key_value_heads": 1, "num_hidden_layers": 3},
        {"decode_mode": "chunk", "chunk_size": 160, "kv_gate_rank": 16},
        {"decode_mode": "chunk", "chunk_size": 512},
    ],
    ids=lambda overrides: ",".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_float32_equals_the_reference_for_every_kind_of_checkpoint(tmp_path, overrides):
    model = save_melt(tmp_path, **overrides)
    lengths = (1, 24, 33, 71, 155)
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


@torch.no_grad()
def test_every_position_of_a_prompt_equals_the_reference(tmp_path):
    model = save_melt(tmp_path)
    everything = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=VOCABULARY, detokenize=False)
    with engine(tmp_path) as llm:
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts(31, 64, 100)]
        for request in llm.generate(asked, everything, use_tqdm=False):
            expected = model(torch.tensor([request.prompt_token_ids])).logits[0].log_softmax(-1)
            for position, candidates in enumerate(request.prompt_logprobs[1:]):
                served = torch.tensor([candidates[token].logprob for token in range(VOCABULARY)])
                torch.testing.assert_close(served, expected[position], atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(tmp_path, loops):
    # Calmer weights than elsewhere: over eight loops the others turn rounding into other clear answers, also in the
    # reference.
    model = save_melt(tmp_path, initializer_range=0.07)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    ours, theirs, agreed = [], [], []
    with engine(tmp_path, dtype="bfloat16", hf_overrides={"total_ut_steps": loops}) as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            exact = reference_logprobs(model, prompt, output.token_ids, loops)
            reference = reference_logprobs(rounded, prompt, output.token_ids, loops)
            served = engine_logprobs(output)
            ours.append((served - exact).abs().mean())
            theirs.append((reference - exact).abs().mean())
            best = exact.topk(2).values
            clear = best[:, 0] - best[:, 1] > 0.25
            agreed.append((served.argmax(-1) == exact.argmax(-1))[clear])
    assert torch.stack(ours).mean() <= 1.5 * torch.stack(theirs).mean()
    assert torch.cat(agreed).all() and len(torch.cat(agreed)) > GENERATED


@pytest.mark.parametrize(("loops", "kv_heads"), [(1, 1), (2, 4), (4, 2), (8, 1)])
def test_tensor_parallel_two_equals_the_reference(tmp_path, monkeypatch, loops, kv_heads):
    """With one KV head, both ranks hold it."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_melt(tmp_path, num_key_value_heads=kv_heads)
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(tmp_path, **parallel, hf_overrides={"total_ut_steps": loops}) as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            assert distance(model, prompt, output, loops) <= FLOAT32, f"prompt of {len(prompt)} tokens"


@MODES
def test_compiled_equals_the_reference(tmp_path, mode):
    model = save_melt(tmp_path, num_hidden_layers=1, decode_mode=mode)
    with engine(tmp_path, enforce_eager=False, hf_overrides={"total_ut_steps": 3}) as llm:
        for prompt, output in zip(prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), strict=True):
            assert distance(model, prompt, output, loops=3) <= FLOAT32, f"prompt of {len(prompt)} tokens"
