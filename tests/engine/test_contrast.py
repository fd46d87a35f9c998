"""Contrast of depths: mixed in a batch, each request's is the reference's; rows and exits do not know of it."""

import pytest
import torch
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError

from tests.engine.engines import (
    CONTRASTS,
    DEPTHS,
    EXITS,
    LENGTHS,
    RIGHT,
    VOCABULARY,
    WRONG,
    distance,
    everything,
    generate,
    on,
    prompts,
    scheduler_of,
)
from tests.engine.scenes import counted

MODES = on("token", "chunk")


@MODES
def test_contrasts_mixed_in_a_batch_equal_the_reference_with_and_without_exits(served):
    llm, model = served
    asked = prompts(*LENGTHS)
    for exits in (None, EXITS):
        outputs = generate(llm, asked, DEPTHS, exits, CONTRASTS, max_tokens=20)
        assert distance(model, asked, outputs, DEPTHS, exits, CONTRASTS) <= RIGHT
        assert distance(model, asked[2:3], outputs[2:3], 8, exits and exits[2]) > WRONG


@MODES
def test_by_default_the_contrast_is_to_half_of_the_loops(served):
    llm, model = served
    asked = prompts(40, 5)
    for loops, half in ((2, 1), (3, 1), (8, 4)):
        outputs = generate(llm, asked, extra_args={"loops": loops, "contrast": 2})
        assert distance(model, asked, outputs, loops, contrasts=[(2, half)] * 2) <= RIGHT


@MODES
def test_cached_rows_are_shared_by_requests_with_and_without_a_contrast(served):
    llm, model = served
    asked = prompts(100)
    for contrast, found in (((2, 1), 0), ((0, 1), 96), ((1, 3), 96)):
        with counted(scheduler_of(llm)) as counts:
            outputs = generate(llm, asked, 4, contrasts=[contrast])
        assert distance(model, asked, outputs, 4, contrasts=[contrast]) <= RIGHT
        assert counts["hit"] == found


@on("token")
@torch.no_grad()
def test_log_probabilities_of_the_prompt_are_contrasted_too(served):
    (prompt,) = prompts(70)
    asked = everything(1, prompt_logprobs=VOCABULARY, extra_args={"contrast": 1.5, "contrast_loop": 1})
    (output,) = served.llm.generate(TokensPrompt(prompt_token_ids=prompt), asked, use_tqdm=False)
    expected = served.model(torch.tensor([prompt]), contrast=1.5, contrast_loop=1).logits[0].log_softmax(-1)
    for position, said in enumerate(output.prompt_logprobs[1:]):
        for token, candidate in said.items():
            assert candidate.logprob == pytest.approx(expected[position, token].item(), abs=RIGHT)


@on("token")
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        *(
            ({"contrast": value}, "from 0, for none, to 10, not")
            for value in (-0.1, 10.5, float("nan"), "1", True, None)
        ),
        ({"contrast_loop": 1}, "contrast must be a number from 0, for none, to 10, not None"),
        *(
            ({"contrast": 1, "contrast_loop": value}, "contrast_loop must be a whole number from 1 to 3, below the")
            for value in (0, 4, 1.5, "1", True, [1])
        ),
        ({"contrast": 0, "contrast_loop": 4}, "contrast_loop must be a whole number from 1 to 3, below the"),
        ({"contrast": 1, "loops": 1}, "needs a loop before the last one, so at least 2 loops; with 1 it must be 0"),
        ({"contrast": 1, "reasoning_effort": "low", "contrast_loop": 2}, "a whole number from 1 to 1"),
        *(({"return_loops": value}, "must be true or false, not") for value in ("yes", 2, None, [True])),
    ],
)
def test_what_cannot_be_is_refused_with_its_range_and_the_engine_lives_on(served, asked, says):
    with pytest.raises(VLLMValidationError, match=says):
        generate(served.llm, prompts(5), extra_args=asked)
    assert len(generate(served.llm, prompts(5), max_tokens=1)[0].token_ids) == 1


@on("token")
def test_none_is_the_same_as_nothing(served):
    asked = prompts(40)
    for none in ({"contrast": 0}, {"contrast": 0.0, "contrast_loop": 2}, {"contrast": 0, "loops": 4}):
        outputs = generate(served.llm, asked, extra_args=none)
        assert distance(served.model, asked, outputs) <= RIGHT
