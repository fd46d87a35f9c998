"""The engine equals the reference model: prefill and decode, over loops, chunks, gates, heads and dtypes."""

import copy

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from tests.engine.engines import (
    AROUND_CUTS,
    GENERATED,
    RIGHT,
    VOCABULARY,
    WRONG,
    distance,
    engine,
    engine_logprobs,
    generate,
    on,
    prompts,
    reference_logprobs,
    save_melt,
)


@on("token", "chunk")
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_float32_equals_the_reference_at_every_depth(served, loops):
    llm, model = served
    asked = prompts(*AROUND_CUTS)
    assert distance(model, asked, generate(llm, asked, loops), loops) <= RIGHT


def test_the_checkpoints_own_depth_may_be_overridden(tmp_path):
    model, asked = save_melt(tmp_path), prompts(*AROUND_CUTS)
    with engine(tmp_path, hf_overrides={"total_ut_steps": 3}) as llm:
        assert distance(model, asked, generate(llm, asked), loops=3) <= RIGHT


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
        {"kv_gate_bias": "loop", "decode_mode": "chunk"},
        {"kv_gate_bias": "loop", "kv_gate_type": "scalar"},
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
    model, asked = save_melt(tmp_path, **overrides), prompts(1, 24, 33, 71, 155)
    with engine(tmp_path) as llm:
        assert distance(model, asked, generate(llm, asked)) <= RIGHT


@on("token")
def test_a_reference_with_other_chunks_is_far_away(served):
    llm, model = served
    asked, other = prompts(100), copy.deepcopy(model)
    other.config.chunk_size = 64
    assert distance(other, asked, generate(llm, asked)) > WRONG


@on("token")
@torch.no_grad()
def test_every_position_of_a_prompt_equals_the_reference(served):
    llm, model = served
    every_position = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=VOCABULARY, detokenize=False)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts(31, 64, 100)]
    for request in llm.generate(asked, every_position, use_tqdm=False):
        expected = model(torch.tensor([request.prompt_token_ids])).logits[0].log_softmax(-1)
        for position, candidates in enumerate(request.prompt_logprobs[1:]):
            said = torch.tensor([candidates[token].logprob for token in range(VOCABULARY)])
            torch.testing.assert_close(said, expected[position], atol=RIGHT, rtol=0)


def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(tmp_path):
    # Calmer weights than elsewhere: over eight loops the others turn rounding into other clear answers, also in the
    # reference.
    model, asked = save_melt(tmp_path, initializer_range=0.07), prompts(*AROUND_CUTS, *AROUND_CUTS)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with engine(tmp_path, dtype="bfloat16") as llm:
        for loops in (1, 2, 4, 8):
            outputs = generate(llm, asked, loops)
            answers = [output.token_ids for output in outputs]
            exact = torch.cat(reference_logprobs(model, asked, answers, loops))
            reference = torch.cat(reference_logprobs(rounded, asked, answers, loops))
            served = torch.cat([engine_logprobs(output) for output in outputs])
            assert (served - exact).abs().mean() <= 1.5 * (reference - exact).abs().mean(), f"{loops} loops"
            best = exact.topk(2).values
            clear = best[:, 0] - best[:, 1] > 0.25
            assert clear.sum() > GENERATED
            assert (served.argmax(-1) == exact.argmax(-1))[clear].all(), f"{loops} loops"
