"""Contrast of depths, held against README.md, section 5, said in logits."""

import pytest
import torch

from tests.modeling.plain import PlainLoopLM
from tests.modeling.test_depth import LOOPS, THRESHOLD, tiny_looplm, tiny_melt
from tests.modeling.test_melt import CLOSE, MODES, feed
from tests.tiny_models import tokens

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("loop", [1, 5, 7])
@pytest.mark.parametrize("threshold", [1.0, THRESHOLD])
@torch.no_grad()
def test_a_looplms_contrast_is_the_plain_formula_and_a_token_that_leaves_by_loop_k_has_none(loop, threshold):
    model, prompt = tiny_looplm(), tokens(1, 11)
    plain = PlainLoopLM(model)
    said = [plain.step(token, LOOPS, threshold)[0] for token in prompt[0].tolist()]
    expected = [logits[-1] + 1.5 * (logits[-1] - logits[min(loop, len(logits)) - 1]) for logits in said]
    output = model(prompt, loops=LOOPS, exit_threshold=threshold, contrast=1.5, contrast_loop=loop)
    torch.testing.assert_close(output.logits[0], torch.stack(expected), **CLOSE)
    without = model(prompt, loops=LOOPS, exit_threshold=threshold)
    left = output.depths <= loop
    assert torch.equal(output.logits[left], without.logits[left]) and torch.equal(output.depths, without.depths)
    assert left.any() == (loop > 1 and threshold < 1)
    assert not torch.isclose(output.logits[~left], without.logits[~left], atol=1e-2).all(dim=-1).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@torch.no_grad()
def test_a_melts_sequences_have_each_their_own_contrast(mode, chunk_size):
    model, batch = tiny_melt(decode_mode=mode, chunk_size=chunk_size), tokens(4, 11)
    depth = {"loops": torch.tensor([8, 4, 1, 8]), "exit_threshold": torch.tensor([1.0, 1.0, 1.0, 0.7])}
    weights, loops = torch.tensor([0.5, 2.0, 0.0, 1.0]), torch.tensor([4, 1, 1, 3])
    output = model(batch, **depth, contrast=weights, contrast_loop=loops, output_loops=True)
    last, earlier = output.loop_logits[-1], output.loop_logits[loops - 1, torch.arange(4)]
    torch.testing.assert_close(output.logits, last + weights[:, None, None] * (last - earlier), **CLOSE)
    assert torch.equal(output.depths, model(batch, **depth).depths)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_decoding_contrasts_as_one_call_does_and_by_default_with_half_of_the_loops(mode):
    model, batch = tiny_melt(decode_mode=mode, chunk_size=1), tokens(2, 9)
    whole = model(batch, loops=6, contrast=2.0, contrast_loop=3).logits
    torch.testing.assert_close(feed(model, batch, [4, 1, 1, 3], loops=6, contrast=2.0), whole, **CLOSE)
    answers = model.generate(batch, loops=6, contrast=2.0, **OPTIONS)
    again = model(answers, loops=6, contrast=2.0).logits
    assert answers[:, 9:].tolist() == again[:, 8:-1].argmax(-1).tolist()
    assert answers.tolist() != model.generate(batch, loops=6, **OPTIONS).tolist()


@torch.no_grad()
def test_states_are_combined_in_float32():
    model, prompt = tiny_looplm().to(torch.bfloat16), tokens(1, 9)
    states = model(prompt, output_states=True).loop_states.float()
    exact = (states[3] + 9 * (states[3] - states[0])).to(torch.bfloat16)
    assert torch.equal(model(prompt, contrast=9, contrast_loop=1).logits, model.lm_head(exact))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"contrast": -0.5}, r"a number from 0, not \[-0.5, -0.5\]"),
        ({"contrast": torch.tensor([1.0, torch.inf])}, r"a number from 0, not \[1.0, inf\]"),
        ({"contrast": 1.0, "contrast_loop": 4}, r"from 1 to below the loops, \[4, 4\], not \[4, 4\]"),
        ({"contrast": 1.0, "contrast_loop": 0}, r"from 1 to below the loops, \[4, 4\], not \[0, 0\]"),
        ({"contrast": 1.0, "contrast_loop": 1.5}, r"from 1 to below the loops, \[4, 4\], not \[1.5, 1.5\]"),
        ({"contrast": 1.0, "loops": torch.tensor([4, 1])}, r"from 1 to below the loops, \[4, 1\], not \[2, 1\]"),
        ({"contrast_loop": 2}, "contrast_loop=2 needs a contrast"),
    ],
)
def test_a_contrast_that_cannot_be_is_refused_by_its_value(asked, says):
    for model in (tiny_melt(), tiny_looplm()):
        with pytest.raises(ValueError, match=says):
            model(tokens(2, 5), **asked)
