"""Loops per sequence and per token: each sequence as it is alone, each early exit as README.md, section 4, has it."""

import pytest
import torch

from tests.modeling.plain import PlainLoopLM, PlainMelt
from tests.modeling.test_melt import CLOSE, MODES, feed
from tests.tiny_models import tiny_looplm as lively_looplm
from tests.tiny_models import tiny_melt as lively_melt
from tests.tiny_models import tokens

BOTH_MODES = pytest.mark.parametrize("mode", MODES)
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 4, 5, 16])
LOOPS, THRESHOLD = 8, 0.85


def tiny_melt(**overrides):
    """Build a MELT whose exit gate is undecided."""
    return undecided(lively_melt(**overrides))


def tiny_looplm(**overrides):
    """Build a LoopLM whose exit gate is undecided."""
    return undecided(lively_looplm(**overrides))


def undecided(model):
    model.model.early_exit_gate.weight.data.mul_(0.5)
    model.model.early_exit_gate.bias.data.fill_(-0.6)
    return model


@BOTH_MODES
@CHUNKS
@torch.no_grad()
def test_in_a_batch_of_mixed_depths_each_sequence_is_as_it_is_alone(mode, chunk_size):
    model, batch = tiny_melt(decode_mode=mode, chunk_size=chunk_size), tokens(4, 11)
    loops, thresholds = torch.tensor([1, 8, 3, 8]), torch.tensor([1.0, 1.0, 0.9, 0.7])
    output = model(batch, loops=loops, exit_threshold=thresholds)
    for row, depth, threshold, logits, depths in zip(
        batch, loops.tolist(), thresholds.tolist(), output.logits, output.depths, strict=True
    ):
        alone = model(row[None], loops=depth, exit_threshold=threshold)
        torch.testing.assert_close(logits, alone.logits[0], **CLOSE)
        assert depths.tolist() == alone.depths[0].tolist()
    assert output.depths[0].tolist() == [1] * 11 and output.depths[1].tolist() == [8] * 11


@BOTH_MODES
@pytest.mark.parametrize("kv_heads", [1, 4])
@CHUNKS
@torch.no_grad()
def test_early_exits_equal_a_plain_implementation(mode, kv_heads, chunk_size):
    model, prompt = tiny_melt(decode_mode=mode, chunk_size=chunk_size, num_key_value_heads=kv_heads), tokens(1, 11)
    plain = PlainMelt(model)
    expected = torch.cat([plain.chunk(chunk.tolist(), LOOPS, THRESHOLD) for chunk in prompt[0].split(chunk_size)])
    output = model(prompt, loops=LOOPS, exit_threshold=THRESHOLD)
    torch.testing.assert_close(output.logits[0], expected, **CLOSE)
    assert len(output.depths.unique()) > 2, "exits must be mixed, or this shows nothing"


@torch.no_grad()
def test_with_chunks_of_one_token_early_exits_are_the_exact_models():
    model, prompt = tiny_melt(chunk_size=1), tokens(1, 11)
    exact = model.token_sequential(prompt[0], LOOPS, THRESHOLD)
    torch.testing.assert_close(model(prompt, loops=LOOPS, exit_threshold=THRESHOLD).logits[0], exact, **CLOSE)


@CHUNKS
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [3, 1, 1, 6], [10, 1]])
@torch.no_grad()
def test_in_chunk_mode_early_exits_do_not_depend_on_where_the_prompt_ends(chunk_size, pieces):
    model, prompt = tiny_melt(decode_mode="chunk", chunk_size=chunk_size), tokens(2, 11)
    depth = {"loops": LOOPS, "exit_threshold": THRESHOLD}
    torch.testing.assert_close(feed(model, prompt, pieces, **depth), model(prompt, **depth).logits, **CLOSE)


@torch.no_grad()
def test_in_token_mode_a_token_generated_is_a_chunk_of_its_own_at_its_own_depth():
    model, sequence = tiny_melt(), tokens(1, 12)
    plain = PlainMelt(model)
    chunks = [*sequence[0, :6].split(4), *sequence[0, 6:].split(1)]
    expected = torch.cat([plain.chunk(chunk.tolist(), LOOPS, THRESHOLD) for chunk in chunks])
    depth = {"loops": LOOPS, "exit_threshold": THRESHOLD}
    torch.testing.assert_close(feed(model, sequence, [6] + [1] * 6, **depth)[0], expected, **CLOSE)
    at_once = model(sequence, prompt_lengths=torch.tensor([6]), **depth)
    torch.testing.assert_close(at_once.logits[0], expected, **CLOSE)


@BOTH_MODES
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_count(mode, side):
    model, sequence = tiny_melt(decode_mode=mode), tokens(1, 9)
    alone = model(sequence, loops=LOOPS, exit_threshold=THRESHOLD)
    real = slice(5, 14) if side == "left" else slice(0, 9)
    batch, mask = tokens(2, 14, seed=1), torch.ones(2, 14, dtype=torch.long)
    mask[0] = 0
    mask[0, real], batch[0, real] = 1, sequence[0]
    output = model(batch, attention_mask=mask, loops=LOOPS, exit_threshold=torch.tensor([THRESHOLD, 1.0]))
    torch.testing.assert_close(output.logits[0, real], alone.logits[0], **CLOSE)
    assert output.depths[0, real].tolist() == alone.depths[0].tolist()
    assert output.depths[0].sum() == alone.depths.sum() and output.depths[1].tolist() == [LOOPS] * 14


@torch.no_grad()
def test_a_lower_threshold_runs_fewer_loops_and_one_runs_all():
    model, prompt = tiny_melt(), tokens(4, 12)
    thresholds = (0.01, 0.5, 0.7, 0.9, 0.99, 1.0)
    means = [model(prompt, loops=8, exit_threshold=q).depths.float().mean().item() for q in thresholds]
    assert means == sorted(means) and means[0] == 1 and means[-1] == 8
    assert 1 < means[2] < 8


@torch.no_grad()
def test_at_threshold_one_not_even_a_sure_gate_ends_a_loop():
    model, prompt = tiny_melt(), tokens(1, 9)
    model.model.early_exit_gate.bias.fill_(1e4)
    assert model(prompt, exit_threshold=0.999).depths.tolist() == [[1] * 9]
    assert model(prompt, exit_threshold=1.0).depths.tolist() == [[4] * 9]


@BOTH_MODES
@torch.no_grad()
def test_generate_takes_a_depth_for_each_sequence(mode):
    model, prompts = tiny_melt(decode_mode=mode), tokens(3, 7)
    depth = {"loops": torch.tensor([2, 6, 4]), "exit_threshold": torch.tensor([1.0, 0.8, 1.0])}
    together = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **depth)
    for i, prompt in enumerate(prompts):
        own = {"loops": depth["loops"][i].item(), "exit_threshold": depth["exit_threshold"][i].item()}
        alone = model.generate(
            prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **own
        )
        assert together[i].tolist() == alone[0].tolist()


@pytest.mark.parametrize(
    ("depth", "says"),
    [
        ({"loops": 0}, "from 1 to max_loops=8, not 0"),
        ({"loops": torch.tensor([4, 9])}, r"from 1 to max_loops=8, not \[4, 9\]"),
        ({"loops": 2.5}, "from 1 to max_loops=8, not 2.5"),
        ({"exit_threshold": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"exit_threshold": torch.tensor([0.5, 1.5])}, r"above 0 and at most 1, not \[0.5, 1.5\]"),
    ],
)
def test_a_depth_that_cannot_be_is_refused_by_its_value(depth, says):
    with pytest.raises(ValueError, match=says):
        tiny_melt()(tokens(2, 5), **depth)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [3, 1, 1, 6]])
@torch.no_grad()
def test_a_looplms_early_exits_equal_a_plain_implementation_however_it_is_fed(kv_heads, pieces):
    model, prompt = tiny_looplm(num_key_value_heads=kv_heads), tokens(1, 11)
    plain = PlainLoopLM(model)
    answers = [plain.step(token, LOOPS, THRESHOLD)[0] for token in prompt[0].tolist()]
    ran = [len(logits) for logits in answers]
    output = model(prompt, loops=LOOPS, exit_threshold=THRESHOLD)
    assert output.depths.tolist() == [ran]
    assert len(set(ran)) > 2, "exits must be mixed, or this shows nothing"
    fed = feed(model, prompt, pieces, loops=LOOPS, exit_threshold=THRESHOLD)
    torch.testing.assert_close(fed[0], torch.stack([logits[-1] for logits in answers]), **CLOSE)


@torch.no_grad()
def test_a_looplms_sequences_of_mixed_depths_are_as_alone_in_prompt_padding_and_generation():
    model, batch, mask = tiny_looplm(), tokens(4, 11), torch.ones(4, 11, dtype=torch.long)
    mask[1, :4] = 0
    loops, thresholds = torch.tensor([1, 8, 3, 8]), torch.tensor([1.0, 1.0, 0.9, 0.7])
    depth = {"loops": loops, "exit_threshold": thresholds}
    output = model(batch, attention_mask=mask, **depth)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(batch, attention_mask=mask, **depth, **options)[:, 11:]
    for i, row in enumerate(batch):
        real, own = mask[i].bool(), {"loops": loops[i].item(), "exit_threshold": thresholds[i].item()}
        alone = model(row[None, real], **own)
        torch.testing.assert_close(output.logits[i, real], alone.logits[0], **CLOSE)
        assert output.depths[i, real].tolist() == alone.depths[0].tolist()
        assert model.generate(row[None, real], **own, **options)[0, real.sum() :].tolist() == answers[i].tolist()
    assert output.depths[0].tolist() == [1] * 11 and output.depths[1].tolist() == [0] * 4 + [8] * 7


@torch.no_grad()
def test_a_looplm_at_threshold_one_runs_all_loops_as_without_depths():
    model, prompt = tiny_looplm(), tokens(2, 9)
    model.model.early_exit_gate.bias.fill_(1e4)
    output = model(prompt)
    assert output.depths.tolist() == [[4] * 9] * 2 and (model(prompt, exit_threshold=0.999).depths == 1).all()
    mixed = model(prompt, loops=torch.tensor([4, 2]))
    torch.testing.assert_close(mixed.logits[0], output.logits[0], **CLOSE)
    torch.testing.assert_close(mixed.logits[1], model(prompt[1:], loops=2).logits[0], **CLOSE)
