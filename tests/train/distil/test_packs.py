"""Packs on the model's side: several documents in a row of the batch compute what each computes alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from melt_serve.modeling import LoopLMConfig, MeltRows, OuroForCausalLM
from melt_serve.train.data.batch import IGNORED, Batch
from melt_serve.train.distil import losses, phase
from melt_serve.train.distil.losses import cross_entropy_over_loops, distillation
from melt_serve.train.distil.rows import TrainingRows
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import ask_teacher
from melt_serve.train.stages import Distillation
from tests.tiny_models import SHAPE, enliven, tiny_melt, tokens

CHUNK = 4
LOOPS = 3
LENGTHS = ((5, 8, 1, 6), (3, 13), (4, 2))
"""Documents of each pack: with and without a tail in their last chunk; the last pack is shorter than the others."""
EXACT = {"atol": 1e-10, "rtol": 1e-8}


def documents() -> list[list[Tensor]]:
    return [[tokens(n, seed=100 * row + n) for n in lengths] for row, lengths in enumerate(LENGTHS)]


def packed() -> Batch:
    """Pack by hand: every document on the next multiple of C."""
    width = 26  # no multiple of C
    ids, mask, labels, starts = (torch.zeros(len(LENGTHS), width, dtype=torch.long) for _ in range(4))
    labels.fill_(IGNORED)
    for row, texts in enumerate(documents()):
        column = 0
        for text in texts:
            here = slice(column, column + len(text))
            ids[row, here], mask[row, here], labels[row, here], starts[row, here] = text, 1, text, column
            labels[row, column] = IGNORED
            column += -(-len(text) // CHUNK) * CHUNK
    return Batch(ids, mask, labels, document_starts=starts)


def unpacked() -> Batch:
    """Pad the documents to a batch of one each, in the packs' order."""
    texts = [text for pack in documents() for text in pack]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(text) for text in texts], batch_first=True)
    return Batch(pad(texts, batch_first=True), mask, pad(texts, batch_first=True, padding_value=IGNORED))


def models(mode: str) -> tuple[OuroForCausalLM, Student]:
    torch.manual_seed(7)
    teacher = enliven(OuroForCausalLM(LoopLMConfig(**SHAPE))).double()
    student = Student(tiny_melt(chunk_size=CHUNK, decode_mode=mode).config).double()
    student.load_state_dict(tiny_melt(chunk_size=CHUNK).state_dict())
    return teacher, student


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    given = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, given, strict=True))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for key, gradient in one.items():
        torch.testing.assert_close(gradient, other[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")
    assert sum(bool(gradient.any()) for gradient in one.values()) > len(one) / 2


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("run_again", [False, True], ids=["", "chunks-run-again"])
def test_the_students_losses_and_gradients_do_not_depend_on_packing(alpha, mode, run_again):
    teacher, student = models(mode)
    student.checkpoint_chunks = run_again
    results = []
    for batch in (packed(), unpacked()):
        wanted = ask_teacher(teacher, batch, batch.before_reply, LOOPS, attention=True)
        given = student.run_batch(batch, batch.before_reply, LOOPS, alpha, wanted.attention)
        loss = distillation(wanted.logits, given.logits)
        results.append((given.logits, loss, given.distance, gradients(student, loss + given.distance)))
    (logits, loss, distance, of_packed), (logits_alone, loss_alone, distance_alone, of_unpacked) = results
    torch.testing.assert_close(logits, logits_alone, **EXACT)
    torch.testing.assert_close(loss, loss_alone, **EXACT)
    torch.testing.assert_close(distance, distance_alone, **EXACT)
    assert_same(of_packed, of_unpacked)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("run_again", [False, True], ids=["", "chunks-run-again"])
@pytest.mark.parametrize("exits", [False, True], ids=["", "exits"])
def test_two_passes_over_packs_have_the_losses_and_gradients_of_documents_alone(alpha, run_again, exits):
    """The first tokens of each document are its prompt."""
    teacher, student = models("token")
    torch.nn.init.constant_(student.model.early_exit_gate.bias, -1.0)  # or all leave after loop 1, where passes agree
    student.checkpoint_chunks = run_again
    results = []
    for batch in map(with_prompts, (packed(), unpacked())):
        wanted = ask_teacher(teacher, batch, batch.real, LOOPS, attention=True)
        thresholds = batch.input_ids.double() % 7 / 7 if exits else None
        options = {"decode_aware": "passes", "thresholds": thresholds}
        given = student.run_batch(batch, batch.real, LOOPS, alpha, wanted.attention, **options)
        loss = distillation(wanted.logits, given.logits) + given.distance
        loops = given.loops_run if exits else torch.zeros(())
        results.append((given.logits, loss, loops, gradients(student, loss + loops)))
        grid = student.run_batch(batch, batch.real, LOOPS, alpha, wanted.attention, thresholds=thresholds)
        assert (grid.logits - given.logits).abs().max() > 1e-2
    (logits, loss, loops, of_packed), (logits_alone, loss_alone, loops_alone, of_unpacked) = results
    torch.testing.assert_close(logits, logits_alone, **EXACT)
    torch.testing.assert_close(loss, loss_alone, **EXACT)
    torch.testing.assert_close(loops, loops_alone)  # counted in float32
    assert_same(of_packed, of_unpacked)


def alone_in_a_row() -> list[Batch]:
    """The packs, a batch each."""
    batch = packed()
    fields = (batch.input_ids, batch.attention_mask, batch.labels, batch.document_starts)
    rows = zip(*(field.split(1) for field in fields if field is not None), strict=True)
    return [Batch(ids, mask, labels, document_starts=starts) for ids, mask, labels, starts in rows]


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("run_again", [False, True], ids=["", "chunks-run-again"])
@pytest.mark.parametrize("chunk_size", [CHUNK // 2, CHUNK])
def test_chunks_without_a_mask_have_the_losses_and_gradients_of_masked_ones(
    alpha, mode, run_again, chunk_size, monkeypatch
):
    teacher, student = models(mode)
    student.checkpoint_chunks = run_again
    unmasked: list[bool] = []
    visible, own = MeltRows.visible, TrainingRows.visible

    def noting(rows, chunk):
        unmasked.append(own(rows, chunk) is None)
        return own(rows, chunk)

    def results(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = ask_teacher(teacher, batch, batch.before_reply, LOOPS, attention=True)
        given = student.run_batch(batch, batch.before_reply, LOOPS, alpha, wanted.attention, chunk_size=chunk_size)
        loss = distillation(wanted.logits, given.logits) + given.distance
        return loss, gradients(student, loss)

    for batch, always in (*((each, True) for each in alone_in_a_row()), (unpacked(), True), (packed(), False)):
        unmasked.clear()
        monkeypatch.setattr(TrainingRows, "visible", noting)
        loss, given = results(batch)
        assert all(unmasked) if always else (any(unmasked) and not all(unmasked))
        monkeypatch.setattr(TrainingRows, "visible", visible)
        expected, of_masked = results(batch)
        torch.testing.assert_close(loss, expected, **EXACT)
        assert_same(given, of_masked)


def with_prompts(batch: Batch) -> Batch:
    """Let the first two tokens of every document be its prompt."""
    columns = torch.arange(batch.labels.shape[1])
    starts = 0 if batch.document_starts is None else batch.document_starts
    return replace(batch, labels=batch.labels.masked_fill((columns - starts).expand_as(batch.labels) < 2, IGNORED))


def test_what_is_generated_begins_with_each_documents_first_learnt_token():
    pack, alone = with_prompts(packed()), with_prompts(unpacked())
    for batch, starts in ((pack, pack.document_starts), (alone, torch.zeros_like(alone.labels))):
        expected = batch.real & (torch.arange(batch.labels.shape[1]) - starts >= 2)
        assert torch.equal(batch.generated, expected) and expected.any() and not expected.all()
    unlearnt_later = pack.labels.clone()
    unlearnt_later[0, 4 + CHUNK + 4] = IGNORED  # inside a reply, as a user's turn would be
    assert torch.equal(replace(pack, labels=unlearnt_later).generated, pack.generated)


@pytest.mark.parametrize("kd_at", ["all", "last"])
@pytest.mark.parametrize("exits", [False, True], ids=["", "exits"])
def test_a_steps_losses_and_gradients_do_not_depend_on_slices_of_logits(exits, kd_at, monkeypatch):
    """Against the logits of all tokens and loops at once."""
    teacher, student = models("token")
    student.checkpoint_chunks = True
    stage = Distillation(steps=4, learning_rate=1.0, loops=(LOOPS,), kd_at=kd_at, alignment=0.1)
    if exits:
        stage = replace(stage, loop_price=0.5, exit_share=1.0)
    batch = packed()

    def results() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parts = phase.phase_losses(stage, 2, 0, teacher, student, batch, 30, batch.real.sum())
        return {part: value.detach() for part, value in parts.items()}, gradients(student, parts["loss"])

    monkeypatch.setattr(losses, "ANSWERS_AT_ONCE", 7)
    parts, of_slices = results()

    def at_once(teacher, its_head, student, head, count):
        answered = F.linear(teacher, its_head), F.linear(student, head)
        by_loop = [distillation(wanted[None], given[None], count) for wanted, given in zip(*answered, strict=True)]
        return distillation(*answered, count), torch.stack(by_loop).detach()

    monkeypatch.setattr(phase, "distillation_by_loop", at_once)
    expected, of_all = results()
    torch.testing.assert_close(parts, expected, **EXACT)
    assert_same(of_slices, of_all)


def test_the_teachers_loss_and_gradients_do_not_depend_on_packing():
    teacher, _ = models("token")
    results = []
    for batch in (packed(), unpacked()):
        output = teacher(
            batch.input_ids, batch.attention_mask, document_starts=batch.document_starts, loops=LOOPS, output_loops=True
        )
        targets = batch.labels.roll(-1, dims=1)[batch.before_reply].expand(LOOPS, -1)
        loss = cross_entropy_over_loops(output.loop_logits[:, batch.before_reply], targets)
        results.append((loss, gradients(teacher, loss)))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    assert_same(results[0][1], results[1][1])


def test_a_documents_answers_do_not_depend_on_its_neighbours_tokens():
    """In every row, the second document of the pack is replaced; nothing else changes, and that does."""
    teacher, student = models("token")
    batch, other = packed(), packed()
    replaced = torch.zeros_like(batch.real)
    for row, (first, second, *_) in enumerate(LENGTHS):
        start = -(-first // CHUNK) * CHUNK
        replaced[row, start : start + second] = True
    other.input_ids[replaced] = tokens(int(replaced.sum()), seed=9)
    with torch.no_grad():
        for model in (teacher, student):
            logits, changed = (
                model(each.input_ids, each.attention_mask, document_starts=each.document_starts).logits
                for each in (batch, other)
            )
            kept = batch.real & ~replaced
            torch.testing.assert_close(logits[kept], changed[kept], **EXACT)
            assert not torch.allclose(logits[replaced], changed[replaced])


@torch.no_grad()
def test_rows_of_finished_documents_are_dropped():
    """So that a pack of short documents costs what they cost, not what one long document does."""
    _, student = models("token")
    batch = packed()
    rows = student(
        batch.input_ids[:1], batch.attention_mask[:1], document_starts=batch.document_starts[:1], use_cache=True
    ).past_key_values
    last = LENGTHS[0][-1]
    assert rows.final_positions.shape[1] <= -(-last // CHUNK) * CHUNK
    assert rows.final_rows(0)[0].shape[1] == last == rows.lengths


@torch.no_grad()
def test_every_pack_of_a_width_runs_the_same_number_of_chunks():
    """Ranks that gather shards of the weights for every chunk must all do so equally often."""
    _, student = models("token")
    sizes = []
    run_chunk = student.run_chunk
    student.run_chunk = lambda x, *rest: sizes.append(x.shape[1]) or run_chunk(x, *rest)
    batch = packed()
    for row in range(len(LENGTHS)):
        here = slice(row, row + 1)
        student(batch.input_ids[here], batch.attention_mask[here], document_starts=batch.document_starts[here])
    assert sizes == [CHUNK, CHUNK, CHUNK, CHUNK, CHUNK, CHUNK, 2] * len(LENGTHS)


@torch.no_grad()
def test_bad_packs_are_refused():
    _, student = models("token")
    batch = packed()

    def run(**changed: Tensor) -> None:
        given = {"attention_mask": batch.attention_mask, "document_starts": batch.document_starts, **changed}
        student(batch.input_ids, **given)

    late = (torch.arange(26) >= 2).long().expand(3, -1)
    with pytest.raises(ValueError, match="begins at column 2 of a pack, no multiple of chunk_size=4"):
        run(document_starts=torch.full_like(late, 2), attention_mask=late)
    with pytest.raises(ValueError, match="hole"):
        run(document_starts=torch.zeros_like(late), attention_mask=late)
    hole = batch.attention_mask.clone()
    hole[0, 2] = 0
    with pytest.raises(ValueError, match="hole"):
        run(attention_mask=hole)
    with pytest.raises(ValueError, match="without prompt_lengths"):
        run(prompt_lengths=torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="one chat a row"):
        student.run_batch(batch, batch.before_reply, LOOPS, decode_aware="tokens")
