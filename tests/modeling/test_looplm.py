"""The reference LoopLM is its README's section 1, cached, padded and generated from alike."""

import pytest
import torch
import torch.nn.functional as F

from melt_serve.modeling import masks
from tests.modeling.plain import PlainLoopLM
from tests.tiny_models import tiny_looplm, tokens

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("loops", [1, 2, 4])
@torch.no_grad()
def test_every_loops_answer_equals_a_plain_implementation(kv_heads, loops):
    model = tiny_looplm(num_key_value_heads=kv_heads, rope_theta=100.0)
    prompt = tokens(1, 9)
    plain = PlainLoopLM(model)
    logits, exits = zip(*(plain.step(token, loops) for token in prompt[0].tolist()), strict=True)
    output = model(prompt, loops=loops, output_loops=True)
    torch.testing.assert_close(output.loop_logits[:, 0], torch.stack(logits, dim=1), **CLOSE)
    torch.testing.assert_close(output.exit_probabilities[:, 0], torch.stack(exits, dim=1), **CLOSE)
    assert torch.equal(output.logits, output.loop_logits[-1])


@torch.no_grad()
def test_states_are_what_the_heads_answer_from():
    model, prompt = tiny_looplm(), tokens(2, 9)
    states, output = model(prompt, output_states=True).loop_states, model(prompt, output_loops=True)
    assert torch.equal(model.lm_head(states), output.loop_logits)
    assert torch.equal(model.exit_probabilities(states), output.exit_probabilities)


@pytest.mark.parametrize("queries", [1, 3, 9])
@torch.no_grad()
def test_answers_do_not_depend_on_how_many_queries_attend_at_once(queries, monkeypatch):
    model, (ids, mask) = tiny_looplm(), (tokens(2, 9), torch.tensor([[0, 0, *[1] * 7], [1] * 9]))
    expected = model(ids, attention_mask=mask).logits
    monkeypatch.setattr(masks, "QUERIES_AT_ONCE", queries)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_loops_change_the_answer():
    model, prompt = tiny_looplm(), tokens(1, 9)
    answers = model(prompt, output_loops=True).loop_logits
    assert all((answers[i] - answers[i + 1]).abs().max() > 0.1 for i in range(3))


@pytest.mark.parametrize("pieces", [[1] * 11, [5, 6], [4, 1, 1, 5]])
@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_prompt_at_once(pieces):
    model, prompt = tiny_looplm(), tokens(2, 11)
    cache, logits = None, []
    for piece in prompt.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(prompt).logits, **CLOSE)


@pytest.mark.parametrize("loops", [1, 3])
def test_the_cache_holds_a_row_for_every_layer_loop_and_token(loops):
    cache = tiny_looplm()(tokens(2, 5), use_cache=True, loops=loops).past_key_values
    assert len(cache.layers) == 2 * loops
    assert all(rows.keys.shape == rows.values.shape == (2, 2, 5, 16) for rows in cache.layers)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_sequences_answer_as_alone(side):
    model, lengths = tiny_looplm(), (3, 9, 6)
    alone = [tokens(1, length, seed=length) for length in lengths]
    padded = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(alone):
        at = slice(9 - ids.shape[1], 9) if side == "left" else slice(0, ids.shape[1])
        padded[row, at], mask[row, at] = ids, 1
    logits = model(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, ids in enumerate(alone):
        torch.testing.assert_close(logits[row, mask[row].bool()], model(ids).logits[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_goes_on_as_each_sequence_alone(side):
    model, prompts, following = tiny_looplm(rope_theta=100.0), (tokens(3, seed=1), tokens(9, seed=2)), tokens(2, 4)
    batch = torch.stack([F.pad(ids, (9 - len(ids), 0) if side == "left" else (0, 9 - len(ids))) for ids in prompts])
    mask = (batch != 0).long()
    cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
    logits = model(following, attention_mask=F.pad(mask, (0, 4), value=1), past_key_values=cache).logits
    for row, ids in enumerate(prompts):
        alone = model(torch.cat((ids, following[row]))[None]).logits[0, -4:]
        torch.testing.assert_close(logits[row], alone, **CLOSE)


def test_generated_in_a_left_padded_batch_as_alone():
    model = tiny_looplm()
    short, long = tokens(1, 4, seed=1), tokens(1, 9, seed=2)
    batch = torch.cat((F.pad(short, (5, 0)), long))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)[:, 9:]
    for row, prompt in enumerate((short, long)):
        mask = torch.ones_like(prompt)
        assert torch.equal(together[row], model.generate(prompt, attention_mask=mask, **options)[0, prompt.shape[1] :])
        uncached = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(together[row], uncached[0, prompt.shape[1] :])


def test_the_loss_is_next_token_cross_entropy():
    model, prompt = tiny_looplm(), tokens(2, 7)
    labels = prompt.masked_fill(prompt % 3 == 0, -100)
    output = model(prompt, labels=labels)
    by_hand = [
        -output.logits[b, i].log_softmax(-1)[labels[b, i + 1]]
        for b in range(2)
        for i in range(6)
        if labels[b, i + 1] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean())


def test_logits_are_kept_for_the_last_tokens_only():
    model, prompt = tiny_looplm(), tokens(2, 7)
    torch.testing.assert_close(model(prompt, logits_to_keep=2).logits, model(prompt).logits[:, -2:], **CLOSE)


def test_every_weight_has_a_finite_gradient_that_is_not_zero():
    model, prompt = tiny_looplm(), tokens(2, 8)
    output = model(prompt, labels=prompt, output_loops=True)
    (output.loss + output.exit_probabilities.mean()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("loops", [0, -1])
def test_fewer_than_one_loop_is_refused(loops):
    with pytest.raises(ValueError, match=f"loops must be at least 1, not {loops}"):
        tiny_looplm()(tokens(1, 3), loops=loops)
