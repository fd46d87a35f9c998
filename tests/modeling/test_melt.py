"""The reference MELT is its README's sections 2 and 3: exact at C=1, a LoopLM where it must be one, and one function of
its tokens however they are fed."""

import pytest
import torch
import torch.nn.functional as F

from melt_serve.modeling import MeltForCausalLM, MeltRows
from tests.modeling.plain import PlainMelt
from tests.tiny_models import tiny_looplm, tiny_melt, tokens

CLOSE = {"atol": 1e-4, "rtol": 0}
GATE_TYPES = ("elementwise", "scalar", "mean", "ema", "last")
MODES = ("token", "chunk")


def feed(model: MeltForCausalLM, token_ids: torch.Tensor, pieces: list[int], **options: object) -> torch.Tensor:
    """Logits of all tokens, given to the model in pieces."""
    rows, logits = None, []
    for piece in token_ids.split(pieces, dim=1):
        output = model(piece, past_key_values=rows, use_cache=True, **options)
        rows = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize("initial_state", ["input", "zeros"])
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
@torch.no_grad()
def test_chunks_of_one_token_are_the_exact_model(gate_type, initial_state, loops):
    prompt = tokens(1, 7)
    model = tiny_melt(chunk_size=1, kv_gate_type=gate_type, kv_gate_initial_state=initial_state)
    exact = model.token_sequential(prompt[0], loops=loops)
    for mode in MODES:
        model.config.decode_mode = mode
        torch.testing.assert_close(model(prompt, loops=loops).logits[0], exact, **CLOSE)


@pytest.mark.parametrize("gate_type", ["elementwise", "scalar"])
@torch.no_grad()
def test_a_bias_a_loop_is_the_same_in_chunks_exactly_and_plainly(gate_type):
    model, prompt = tiny_melt(chunk_size=1, kv_gate_type=gate_type, kv_gate_bias="loop"), tokens(1, 7)
    plain = PlainMelt(model)
    expected = torch.cat([plain.chunk(token.tolist(), 5) for token in prompt[0].split(1)])
    torch.testing.assert_close(model.token_sequential(prompt[0], loops=5), expected, **CLOSE)
    for mode in MODES:
        model.config.decode_mode = mode
        torch.testing.assert_close(model(prompt, loops=5).logits[0], expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("chunk_size", "loops"), [(1, 3), (4, 1), (4, 4), (5, 2), (16, 3)])
@torch.no_grad()
def test_any_chunk_size_equals_a_plain_implementation(mode, kv_heads, chunk_size, loops):
    model = tiny_melt(decode_mode=mode, chunk_size=chunk_size, num_key_value_heads=kv_heads, rope_theta=100.0)
    prompt = tokens(1, 11)
    plain = PlainMelt(model)
    expected = [plain.chunk(chunk.tolist(), loops) for chunk in prompt[0].split(chunk_size)]
    torch.testing.assert_close(model(prompt, loops=loops).logits[0], torch.cat(expected), **CLOSE)


@pytest.mark.parametrize(("chunk_size", "prompt_length"), [(4, 1), (4, 6), (4, 8), (16, 5)])
@torch.no_grad()
def test_in_token_mode_generated_tokens_equal_a_plain_implementation(chunk_size, prompt_length):
    model, sequence = tiny_melt(chunk_size=chunk_size), tokens(1, 12)
    plain = PlainMelt(model)
    chunks = [*sequence[0, :prompt_length].split(chunk_size), *sequence[0, prompt_length:].split(1)]
    expected = torch.cat([plain.chunk(chunk.tolist(), loops=4) for chunk in chunks])
    decoded = feed(model, sequence, [prompt_length] + [1] * (12 - prompt_length))
    torch.testing.assert_close(decoded[0], expected, **CLOSE)


def two_plain_passes(
    model: MeltForCausalLM, sequence: torch.Tensor, prompt: int, loops: int, threshold: float
) -> torch.Tensor:
    """Run every chunk once; then each generated token anew, after the final rows that the first pass made before it."""
    plain, logits = PlainMelt(model), []
    for chunk in sequence.split(model.config.chunk_size):
        earlier, start = {layer: list(rows) for layer, rows in plain.final.items()}, plain.position
        answers = plain.chunk(chunk.tolist(), loops, threshold)
        first, second = ({layer: list(rows) for layer, rows in plain.final.items()} for _ in range(2))
        for i, token in enumerate(chunk.tolist(), start=start):
            if i >= prompt:
                plain.final.update({layer: rows[:i] for layer, rows in first.items()})
                plain.position = i
                answers[i - start] = plain.chunk([token], loops, threshold)[0]
                for layer, rows in plain.final.items():
                    second[layer][i] = rows[i]
        plain.final.update(second)
        plain.position = start + len(chunk)
        assert all(second[layer][:start] == rows for layer, rows in earlier.items())
        logits.append(answers)
    return torch.cat(logits)


@pytest.mark.parametrize(("chunk_size", "prompt"), [(4, 1), (4, 6), (5, 5), (16, 3)])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
@torch.no_grad()
def test_two_passes_equal_a_plain_implementation(chunk_size, prompt, threshold):
    model, sequence = tiny_melt(chunk_size=chunk_size), tokens(1, 13)
    model.model.early_exit_gate.weight.normal_(generator=torch.Generator().manual_seed(3))
    generated = torch.arange(13)[None] >= prompt
    given = model(sequence, generated=generated, exit_threshold=threshold, loops=3).logits[0]
    torch.testing.assert_close(given, two_plain_passes(model, sequence[0], prompt, 3, threshold), **CLOSE)


@pytest.mark.parametrize(("chunk_size", "prompt", "length"), [(1, 3, 9), (4, 7, 9), (4, 4, 5), (16, 15, 16)])
@torch.no_grad()
def test_two_passes_are_token_by_token_where_a_chunk_holds_one_generated_token(chunk_size, prompt, length):
    model, sequence = tiny_melt(chunk_size=chunk_size), tokens(2, length)
    generated = torch.arange(length).expand(2, -1) >= prompt
    exact = model(sequence, prompt_lengths=torch.tensor([prompt, prompt])).logits
    torch.testing.assert_close(model(sequence, generated=generated).logits, exact, **CLOSE)


@torch.no_grad()
def test_two_passes_come_nearer_to_token_by_token_than_the_grid():
    model, sequence = tiny_melt(chunk_size=16), tokens(8, 32)
    exact = model(sequence, prompt_lengths=torch.full((8,), 6)).logits
    errors = [
        (model(sequence, generated=generated).logits - exact)[:, 6:].square().mean()
        for generated in (None, torch.arange(32).expand(8, -1) >= 6)
    ]
    assert 0 < errors[1] < 0.5 * errors[0]


@torch.no_grad()
def test_two_passes_of_a_padded_batch_are_those_of_each_sequence():
    model, lengths, prompts = tiny_melt(), (11, 5, 8), (4, 2, 7)
    sequences = [tokens(length, seed=length) for length in lengths]
    for side in ("left", "right"):
        padded, mask = pad(sequences, side)
        generated = torch.stack([mask[row].cumsum(-1) > prompt for row, prompt in enumerate(prompts)])
        together = model(padded, attention_mask=mask, generated=generated).logits
        for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            alone = model(sequence[None], generated=torch.arange(len(sequence))[None] >= prompt).logits[0]
            torch.testing.assert_close(together[row][mask[row].bool()], alone, **CLOSE)


def test_two_passes_are_of_token_mode_and_stand_for_prompt_lengths():
    prompt, generated = tokens(1, 6), torch.ones(1, 6, dtype=torch.bool)
    for mode, words in (("chunk", {}), ("token", {"prompt_lengths": torch.tensor([3])})):
        with pytest.raises(ValueError, match="two passes"):
            tiny_melt(decode_mode=mode)(prompt, generated=generated, **words)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("gate_type", GATE_TYPES)
@torch.no_grad()
def test_at_one_loop_it_is_the_looplm_at_one_loop(gate_type, chunk_size):
    looplm, prompt = tiny_looplm(), tokens(2, 9)
    model = tiny_melt(kv_gate_type=gate_type, chunk_size=chunk_size)
    assert model.load_state_dict(looplm.state_dict(), strict=False).unexpected_keys == []
    torch.testing.assert_close(model(prompt, loops=1).logits, looplm(prompt, loops=1).logits, **CLOSE)


@pytest.mark.parametrize("chunk_size", [9, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_gate_type_last_in_one_chunk_is_the_looplm_at_every_loop(kv_heads, chunk_size):
    looplm, prompt = tiny_looplm(num_key_value_heads=kv_heads), tokens(2, 9)
    model = tiny_melt(kv_gate_type="last", chunk_size=chunk_size, num_key_value_heads=kv_heads)
    model.load_state_dict(looplm.state_dict())
    output, expected = model(prompt, output_loops=True), looplm(prompt, output_loops=True)
    torch.testing.assert_close(output.loop_logits, expected.loop_logits, **CLOSE)
    torch.testing.assert_close(output.exit_probabilities, expected.exit_probabilities, **CLOSE)


@torch.no_grad()
def test_chunks_gates_and_loops_change_the_answer():
    prompt = tokens(1, 12)
    reference = tiny_melt()(prompt).logits
    others = {
        "one chunk": tiny_melt(chunk_size=16)(prompt),
        "chunks of one token": tiny_melt(chunk_size=1)(prompt),
        "another gate": tiny_melt(kv_gate_type="scalar")(prompt),
        "another initial state": tiny_melt(kv_gate_initial_state="zeros")(prompt),
        "more loops": tiny_melt()(prompt, loops=6),
    }
    for what, other in others.items():
        assert (other.logits - reference).abs().max() > 0.1, what


@torch.no_grad()
def test_the_first_chunk_does_not_depend_on_what_follows():
    model, prompt = tiny_melt(), tokens(1, 12)
    torch.testing.assert_close(model(prompt[:, :6]).logits, model(prompt).logits[:, :6], **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("chunk_size", "pieces"), [(4, [4, 4, 3]), (4, [8, 3]), (3, [6, 5]), (5, [5, 5, 1])])
@pytest.mark.parametrize("loops", [1, 4])
@torch.no_grad()
def test_a_prompt_in_pieces_on_the_grid_equals_the_prompt_at_once(mode, chunk_size, pieces, loops):
    model, prompt = tiny_melt(decode_mode=mode, chunk_size=chunk_size), tokens(2, 11)
    torch.testing.assert_close(feed(model, prompt, pieces, loops=loops), model(prompt, loops=loops).logits, **CLOSE)


@pytest.mark.parametrize("pieces", [[3, 8], [1, 2, 5, 3], [6, 1, 4], [1] * 11], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16])
@pytest.mark.parametrize("initial_state", ["input", "zeros"])
@torch.no_grad()
def test_in_chunk_mode_any_pieces_and_decoding_equal_one_pass(pieces, chunk_size, initial_state):
    model = tiny_melt(decode_mode="chunk", chunk_size=chunk_size, kv_gate_initial_state=initial_state)
    prompt = tokens(2, 11)
    torch.testing.assert_close(feed(model, prompt, pieces), model(prompt).logits, **CLOSE)


@pytest.mark.parametrize("prompt_length", [1, 4, 6, 8])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16])
@torch.no_grad()
def test_in_token_mode_decoding_equals_a_pass_with_prompt_lengths(prompt_length, chunk_size):
    model, sequence = tiny_melt(chunk_size=chunk_size), tokens(2, 11)
    decoded = feed(model, sequence, [prompt_length] + [1] * (11 - prompt_length))
    at_once = model(sequence, prompt_lengths=torch.tensor([prompt_length] * 2)).logits
    torch.testing.assert_close(decoded, at_once, **CLOSE)


@torch.no_grad()
def test_in_token_mode_generated_tokens_may_come_several_at_once():
    model, sequence, lengths = tiny_melt(), tokens(2, 11), torch.tensor([6, 6])
    pieces = feed(model, sequence, [6, 3, 2], prompt_lengths=lengths)
    torch.testing.assert_close(pieces, model(sequence, prompt_lengths=lengths).logits, **CLOSE)


@torch.no_grad()
def test_in_token_mode_sequences_may_have_prompts_of_different_lengths():
    model, sequences, lengths = tiny_melt(), tokens(3, 11), (3, 4, 9)
    together = model(sequences, prompt_lengths=torch.tensor(lengths)).logits
    for row, length in enumerate(lengths):
        alone = model(sequences[row : row + 1], prompt_lengths=torch.tensor([length])).logits[0]
        torch.testing.assert_close(together[row], alone, **CLOSE)


@torch.no_grad()
def test_generated_tokens_are_other_rows_in_token_mode_than_on_the_grid():
    model, sequence = tiny_melt(), tokens(1, 11)
    decoded = model(sequence, prompt_lengths=torch.tensor([4])).logits
    assert (decoded - model(sequence).logits).abs().max() > 0.1


@torch.no_grad()
def test_earlier_tokens_may_have_used_other_loops():
    model, sequence = tiny_melt(), tokens(1, 9)
    rows = model(sequence[:, :8], loops=2, use_cache=True).past_key_values
    mixed = model(sequence[:, 8:], past_key_values=rows, loops=6).logits
    plain = PlainMelt(model)
    for chunk in sequence[0, :8].split(4):
        plain.chunk(chunk.tolist(), loops=2)
    torch.testing.assert_close(mixed[0], plain.chunk(sequence[0, 8:].tolist(), loops=6), **CLOSE)


@pytest.mark.parametrize(("mode", "pieces"), [("token", [4, 2]), ("chunk", [4, 2]), ("chunk", [1] * 6)], ids=str)
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 1), (1, 8), (8, 3)])
@torch.no_grad()
def test_a_sequence_may_go_on_with_other_loops_where_a_chunk_closed(mode, pieces, before, after):
    model, sequence = tiny_melt(decode_mode=mode), tokens(2, 14)
    at_once = model(sequence[:, :8], loops=before, use_cache=True).past_key_values
    expected = model(sequence[:, 8:], past_key_values=at_once, loops=after).logits
    rows, logits = model(sequence[:, :8], loops=before, use_cache=True).past_key_values, []
    for piece in sequence[:, 8:].split(pieces, dim=1):
        logits.append(model(piece, past_key_values=rows, loops=after).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


def pad(sequences: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids in sequences)
    room = [(width - len(ids), 0) if side == "left" else (0, width - len(ids)) for ids in sequences]
    padded = torch.stack([F.pad(ids, gap) for ids, gap in zip(sequences, room, strict=True)])
    return padded, (padded != 0).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_padded_sequences_answer_as_alone(side, mode):
    model = tiny_melt(decode_mode=mode)
    alone = [tokens(length, seed=length) for length in (3, 11, 8)]
    padded, mask = pad(alone, side)
    logits = model(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, ids in enumerate(alone):
        torch.testing.assert_close(logits[row, mask[row].bool()], model(ids[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_padded_batch_goes_on_as_each_sequence_alone(mode, side):
    model = tiny_melt(decode_mode=mode)
    prompts = [tokens(length, seed=length) for length in (3, 9, 8)]
    following = tokens(3, 6, seed=5)
    padded, mask = pad(prompts, side)
    rows = model(padded, attention_mask=mask, use_cache=True).past_key_values
    for column in range(6):
        mask = F.pad(mask, (0, 1), value=1)
        step = following[:, column : column + 1]
        logits = model(step, attention_mask=mask, past_key_values=rows, use_cache=True).logits
        for row, prompt in enumerate(prompts):
            sequence = torch.cat((prompt, following[row, : column + 1]))[None]
            lengths = torch.tensor([len(prompt)]) if mode == "token" else None
            expected = model(sequence, prompt_lengths=lengths).logits[0, -1]
            torch.testing.assert_close(logits[row, -1], expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_generated_in_a_left_padded_batch_as_alone(mode):
    model = tiny_melt(decode_mode=mode)
    prompts = [tokens(length, seed=length) for length in (3, 9, 8)]
    padded, mask = pad(prompts, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **options)[:, 9:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options)
        assert torch.equal(together[row], alone[0, len(prompt) :])


def test_beam_search_with_a_cache_equals_beam_search_without():
    model, prompts = tiny_melt(decode_mode="chunk"), tokens(4, 6)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompts, num_beams=3, **options)
    assert torch.equal(cached, model.generate(prompts, num_beams=3, use_cache=False, **options))
    assert not torch.equal(cached, model.generate(prompts, **options))


@pytest.mark.parametrize("gate_type", ["elementwise", "scalar"])
@pytest.mark.parametrize("initial_state", ["input", "zeros"])
def test_every_weight_has_a_finite_gradient_that_is_not_zero(gate_type, initial_state):
    model = tiny_melt(kv_gate_type=gate_type, kv_gate_initial_state=initial_state)
    prompt = tokens(2, 9)
    output = model(prompt, labels=prompt, output_loops=True)
    (output.loss + output.exit_probabilities.mean()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_earlier_chunks_are_those_of_the_exact_model(mode):
    model, prompt = tiny_melt(decode_mode=mode, chunk_size=1), tokens(1, 6)
    weights = [weight for name, weight in model.named_parameters() if "early_exit_gate" not in name]
    exact = torch.autograd.grad(model.token_sequential(prompt[0])[-1].logsumexp(0), weights)
    chunked = torch.autograd.grad(model(prompt).logits[0, -1].logsumexp(0), weights)
    for one, other in zip(exact, chunked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_logits_are_kept_for_the_last_tokens_only():
    model, prompt = tiny_melt(), tokens(2, 7)
    torch.testing.assert_close(model(prompt, logits_to_keep=2).logits, model(prompt).logits[:, -2:], **CLOSE)


@pytest.mark.parametrize("loops", [0, 9, -1])
def test_loops_out_of_range_are_refused(loops):
    model = tiny_melt()
    for call in (lambda: model(tokens(1, 3), loops=loops), lambda: model.token_sequential(tokens(3), loops=loops)):
        with pytest.raises(ValueError, match=rf"loops must be from 1 to max_loops=8, not {loops}"):
            call()


@torch.no_grad()
def test_in_token_mode_a_prompt_piece_inside_a_chunk_is_refused():
    model = tiny_melt()
    rows = model(tokens(1, 6), use_cache=True).past_key_values
    for length in (2, 3):
        with pytest.raises(ValueError, match="must begin on a multiple of chunk_size=4, not at position 6"):
            model(tokens(1, length), past_key_values=rows)
    with pytest.raises(ValueError, match="must begin on a multiple of chunk_size=4, not at position 6"):
        model(tokens(1, 1), past_key_values=rows, prompt_lengths=torch.tensor([9]))


@torch.no_grad()
def test_in_chunk_mode_an_open_chunk_cannot_go_on_with_other_loops():
    model = tiny_melt(decode_mode="chunk")
    rows = model(tokens(1, 6), use_cache=True, loops=2).past_key_values
    with pytest.raises(ValueError, match="made with 2 loops; it cannot go on with 3"):
        model(tokens(1, 1), past_key_values=rows, loops=3)


def test_stepping_back_is_refused():
    with pytest.raises(ValueError, match="cannot be taken back"):
        MeltRows(tiny_melt().config, batch_size=1).crop(1)


def test_padding_inside_a_sequence_is_refused():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask has a hole"):
        tiny_melt()(tokens(1, 7), attention_mask=mask)
