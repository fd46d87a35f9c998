"""What MELT keeps of a sequence: final rows whatever the loops, and in `chunk` mode the open chunk's."""

import pytest
import torch

from melt_serve.config import kv_bytes_per_token
from melt_serve.modeling import MeltForCausalLM, MeltRows
from tests.tiny_models import tiny_melt, tokens

LAYERS = 2


def rows_of(model: MeltForCausalLM, token_ids: torch.Tensor, **options: object) -> MeltRows:
    with torch.no_grad():
        return model(token_ids, use_cache=True, **options).past_key_values


def kept_bytes(rows: MeltRows) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in rows.layers if layer.is_initialized)


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 4, 10])
def test_in_token_mode_the_size_does_not_depend_on_the_loops(loops, length):
    model = tiny_melt()
    rows = rows_of(model, tokens(1, length), loops=loops)
    assert kept_bytes(rows) == length * kv_bytes_per_token(model.config, bytes_per_value=4)


@pytest.mark.parametrize("loops", [1, 2, 8])
@pytest.mark.parametrize("pieces", [[1] * 13, [6, 7], [3, 3, 7]], ids=str)
def test_in_chunk_mode_only_the_open_chunk_has_rows_per_loop(loops, pieces):
    model = tiny_melt(decode_mode="chunk")
    rows, length = None, 0
    for piece in tokens(1, 13).split(pieces, dim=1):
        rows = rows_of(model, piece, past_key_values=rows, loops=loops)
        length += piece.shape[1]
        in_open_chunk = length % 4
        assert kept_bytes(rows) == (length + (loops - 1) * in_open_chunk) * kv_bytes_per_token(model.config, 4)


def test_in_chunk_mode_a_ragged_batch_drops_what_no_sequence_needs():
    model = tiny_melt(decode_mode="chunk")
    prompts = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    rows = rows_of(model, prompts, attention_mask=mask)
    assert rows.lengths.tolist() == [4, 6]
    assert sorted(rows.open_positions[1].tolist()) == [4, 5]
    rows = rows_of(model, tokens(2, 4), past_key_values=rows)
    assert rows.lengths.tolist() == [8, 10]
    assert rows.open_positions.shape[1] <= 2 * 4


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize("length", [1, 4, 6, 8])
def test_final_rows_of_a_shorter_prompt_are_a_prefix_of_a_longer_ones(mode, length):
    model, prompt = tiny_melt(decode_mode=mode), tokens(1, 11)
    short, long = rows_of(model, prompt[:, :length]), rows_of(model, prompt)
    for layer in range(LAYERS):
        for kept, longer in zip(short.final_rows(layer), long.final_rows(layer), strict=True):
            assert kept.shape == (2, length, 16)
            torch.testing.assert_close(kept, longer[:, :length], atol=1e-4, rtol=0)


def test_final_rows_are_in_order_of_position_for_every_sequence_of_a_ragged_batch():
    model = tiny_melt()
    short, long = tokens(1, 5, seed=1), tokens(1, 11, seed=2)
    batch = torch.cat((torch.cat((torch.zeros(1, 6, dtype=torch.long), short), dim=1), long))
    rows = rows_of(model, batch, attention_mask=(batch != 0).long())
    for sequence, prompt in enumerate((short, long)):
        alone = rows_of(model, prompt)
        for layer in range(LAYERS):
            for together, expected in zip(rows.final_rows(layer, sequence), alone.final_rows(layer), strict=True):
                torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize("length", [6, 8], ids=["an open chunk", "a closed chunk"])
def test_selected_repeated_and_reordered_sequences_go_on_as_themselves(length, mode):
    model, prompts, following = tiny_melt(decode_mode=mode), tokens(2, length), tokens(2, 1, seed=3)

    def go_on(prompt: torch.Tensor, change: str, argument: object, step: torch.Tensor) -> torch.Tensor:
        rows = rows_of(model, prompt)
        getattr(rows, change)(argument)
        with torch.no_grad():
            return model(step, past_key_values=rows).logits

    every_one = torch.arange(2)
    expected = go_on(prompts, "reorder_cache", every_one, following)
    swap = torch.tensor([1, 0])
    changed = {
        "reorder_cache": (swap, following[swap], expected[swap]),
        "batch_select_indices": (torch.tensor([1]), following[1:], expected[1:]),
        "batch_repeat_interleave": (2, following.repeat_interleave(2, 0), expected.repeat_interleave(2, 0)),
    }
    for change, (argument, step, answer) in changed.items():
        torch.testing.assert_close(go_on(prompts, change, argument, step), answer, atol=1e-4, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1
