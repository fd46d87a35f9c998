"""The student in training: alpha 0 is the LoopLM, alpha 1 is MELT, between them the rows are mixed as designed."""

from collections import defaultdict
from itertools import islice

import pytest
import torch

from melt_serve.modeling import LoopLMConfig, OuroForCausalLM
from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.task.who_is_where import questions
from melt_serve.train.data.batch import Batch
from melt_serve.train.data.task_batches import encode
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import ask_teacher
from tests.modeling.plain import PlainMelt
from tests.tiny_models import SHAPE, enliven, tiny_melt, tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def student_of(teacher: OuroForCausalLM, **overrides: object) -> Student:
    reference = tiny_melt(**overrides)
    student = Student(reference.config).eval()
    student.load_state_dict(reference.state_dict())
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def teacher_of(**overrides: object) -> OuroForCausalLM:
    torch.manual_seed(7)
    return enliven(OuroForCausalLM(LoopLMConfig(**{**SHAPE, **overrides})).eval())


def ragged(lengths=(13, 6, 9)) -> Batch:
    """Build random chats, right-padded, in which every token counts as reply."""
    ids = tokens(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels, prompts = ids.masked_fill(~mask, -100), torch.tensor([5, 4, 6][: len(lengths)])
    return Batch(ids * mask, mask.long(), labels, prompts, replies=ids[mask].expand(4, -1))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 64])
@pytest.mark.parametrize("gate", ["elementwise", "mean"])
@torch.no_grad()
def test_alpha_of_zero_is_the_looplm(chunk_size, gate):
    teacher, batch = teacher_of(), ragged()
    student = student_of(teacher, chunk_size=chunk_size, kv_gate_type=gate)
    wanted = ask_teacher(teacher, batch, batch.real, 4, attention=True)
    given = student.run_batch(batch, batch.real, 4, alpha=0.0, teacher_attention=wanted.attention)
    torch.testing.assert_close(given.logits, wanted.logits, **CLOSE)
    assert given.distance < 1e-8 * given.logits.numel()


@pytest.mark.parametrize("decode_aware", [None, "tokens"])
@torch.no_grad()
def test_alpha_of_one_is_melt(decode_aware):
    teacher, batch = teacher_of(), ragged()
    reference = tiny_melt()
    reference.load_state_dict(teacher.state_dict(), strict=False)
    lengths = batch.prompt_lengths if decode_aware else None
    expected = reference(batch.input_ids, batch.attention_mask, prompt_lengths=lengths, output_loops=True).loop_logits
    student = student_of(teacher)
    for alpha in (1.0, 1.0 - 1e-9):  # the second goes through the mixing
        given = student.run_batch(batch, batch.real, 4, alpha, decode_aware=decode_aware)
        torch.testing.assert_close(given.logits, expected[:, batch.real], **CLOSE)


class PlainTransition(PlainMelt):
    """Phase 1 once more, one token at a time: rows mixed, with every loop's LoopLM rows kept for the past."""

    def __init__(self, model, alpha):
        super().__init__(model)
        self.alpha = alpha
        self.looplm = defaultdict(list)

    def mixed(self, melt, looplm):
        return tuple(self.alpha * a + (1 - self.alpha) * b for a, b in zip(melt, looplm, strict=True))

    def chunk(self, ids, loops):
        xs = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        states, own, all_logits = {}, {}, []
        for loop in range(loops):
            for layer in self.layers():
                own[layer] = []
                for i, x in enumerate(xs):
                    n = self.norm(f"{layer}.input_layernorm", x)
                    h = states[layer, i] = self.gated(layer, n, states.get((layer, i)), loop + 1)
                    own[layer].append(self.row(layer, h, self.position + i))
                    self.looplm[loop, layer].append(self.row(layer, n, self.position + i))
                    rows = map(self.mixed, self.final[layer] + own[layer], self.looplm[loop, layer])
                    xs[i] = self.finished(layer, x, self.attended(layer, n, self.position + i, list(rows)))
            xs = [self.norm("model.norm", x) for x in xs]
            all_logits.append(torch.stack([self.linear("lm_head", x) for x in xs]))
        for layer, rows in own.items():
            self.final[layer] += rows
        self.position += len(ids)
        return torch.stack(all_logits)


@pytest.mark.parametrize(
    ("alpha", "mode"), [(0.0, "token"), (0.3, "token"), (0.8, "token"), (1.0, "token"), (0.3, "chunk")]
)
@torch.no_grad()
def test_rows_are_mixed_as_written_out_token_by_token(alpha, mode):
    """On the grid, both modes compute the same."""
    student, batch = student_of(teacher_of(), decode_mode=mode), ragged()
    given = student.run_batch(batch, batch.real, 4, alpha).logits.split([13, 6, 9], dim=1)
    for ids, length, logits in zip(batch.input_ids.tolist(), (13, 6, 9), given, strict=True):
        plain = PlainTransition(student, alpha)
        chunks = [plain.chunk(ids[start : min(start + 4, length)], 4) for start in range(0, length, 4)]
        torch.testing.assert_close(logits, torch.cat(chunks, dim=1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_distance_is_that_of_the_attention_outputs():
    """With one chunk and the last loop's rows, o is the LoopLM's: so scale W_O, and the distance is known."""
    teacher, batch = teacher_of(), ragged()
    student = student_of(teacher, chunk_size=64, kv_gate_type="last")
    wanted = ask_teacher(teacher, batch, batch.real, 4, attention=True)
    first = student.model.layers[0].self_attn.o_proj
    first.weight.mul_(2)
    student.model.layers[0].input_layernorm_2.eps *= 4  # the norm after it undoes the scale, eps included
    given = student.run_batch(batch, batch.real, 4, teacher_attention=wanted.attention, distance="sum")
    expected = sum(o[batch.real].square().sum() for o in wanted.attention[::2])
    torch.testing.assert_close(given.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(given.distance, expected, atol=1e-2, rtol=1e-3)
    relative = student.run_batch(batch, batch.real, 4, teacher_attention=wanted.attention).distance
    every_loop = 4.0 * batch.real.sum()  # a token's own square at each loop of the first layer
    torch.testing.assert_close(relative, every_loop, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("run_again", [False, True], ids=["", "chunks-run-again"])
@torch.no_grad()
def test_two_passes_are_token_by_token_where_a_chunk_holds_one_reply_token(alpha, run_again):
    """All that a loss is made of, and the rows mixed with the LoopLM's, too; at alpha 0 both are the LoopLM."""
    teacher, ids = teacher_of(), tokens(2, 9)
    batch = Batch(ids, torch.ones_like(ids), ids, prompt_lengths=torch.tensor([7, 7]))
    student = lively_gate(student_of(teacher))
    student.checkpoint_chunks = run_again
    wanted = ask_teacher(teacher, batch, batch.real, 4, attention=True)
    thresholds = None if alpha < 1 else torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    exact, near = (
        student.run_batch(batch, batch.real, 4, alpha, wanted.attention, decode_aware=by, thresholds=thresholds)
        for by in ("tokens", "passes")
    )
    torch.testing.assert_close(near.logits, exact.logits, **CLOSE)
    torch.testing.assert_close(near.distance, exact.distance, atol=1e-4, rtol=1e-4)
    if thresholds is None:
        assert near.loops_run is None
    else:
        torch.testing.assert_close(near.loops_run, exact.loops_run)
    if alpha == 0:
        torch.testing.assert_close(near.logits, wanted.logits, **CLOSE)


@pytest.mark.parametrize(("mode", "by"), [("token", None), ("chunk", None), ("token", "passes")])
@torch.no_grad()
def test_a_batch_may_run_at_another_chunk_size_than_the_students_own(mode, by):
    teacher, batch = teacher_of(), ragged()
    own, other = student_of(teacher, decode_mode=mode), student_of(teacher, decode_mode=mode, chunk_size=3)
    expected = other.run_batch(batch, batch.real, 4, decode_aware=by).logits
    torch.testing.assert_close(own.run_batch(batch, batch.real, 4, decode_aware=by, chunk_size=3).logits, expected)
    assert (own.run_batch(batch, batch.real, 4, decode_aware=by).logits - expected).abs().max() > 1e-2


def lively_gate(student: Student) -> Student:
    """Give the student an exit gate with which tokens leave after every loop."""
    with torch.no_grad():
        student.model.early_exit_gate.weight.normal_(generator=torch.Generator().manual_seed(3))
    return student


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
@torch.no_grad()
def test_tokens_leave_in_training_as_they_are_served(chunk_size, threshold):
    student, batch = lively_gate(student_of(teacher_of(), chunk_size=chunk_size)), ragged()
    expected = student(batch.input_ids, batch.attention_mask, exit_threshold=threshold, output_loops=True)
    given = student.run_batch(batch, batch.real, 4, thresholds=torch.full(batch.real.shape, threshold))
    torch.testing.assert_close(given.logits, expected.loop_logits[:, batch.real], **CLOSE)
    assert len(expected.depths[batch.real].unique()) > 2


@torch.no_grad()
def test_without_thresholds_none_leaves_early_whatever_the_config_says():
    student, batch = lively_gate(student_of(teacher_of())), ragged()
    expected = student.run_batch(batch, batch.real, 4).logits
    student.config.early_exit_threshold = 0.2
    assert len(student(batch.input_ids, batch.attention_mask).depths[batch.real].unique()) > 1
    assert torch.equal(student.run_batch(batch, batch.real, 4).logits, expected)


@torch.no_grad()
def test_the_loops_run_are_those_of_tokens_whose_thresholds_are_drawn():
    """The expected loops are the mean of the loops run over many draws; one chunk, so that no draw sways another."""
    student, batch = lively_gate(student_of(teacher_of(), chunk_size=1)), ragged((1, 1, 1))
    student.model.embed_tokens.weight[1:] = student.model.embed_tokens.weight[1]
    expected = student.run_batch(batch, batch.real, 4, thresholds=torch.full(batch.real.shape, 1.0)).loops_run / 3
    thresholds = torch.linspace(0.001, 0.999, 500).split(1)
    run = [student(batch.input_ids[:1], exit_threshold=threshold).depths.item() for threshold in thresholds]
    assert sum(run) / 500 == pytest.approx(expected.item(), abs=0.02) and len(set(run)) > 2


def test_the_exit_gate_learns_from_the_replies_and_from_the_price():
    student, batch = lively_gate(student_of(teacher_of())), ragged()
    student.requires_grad_(False)
    weight = student.model.early_exit_gate.weight.requires_grad_()
    thresholds = torch.rand(batch.real.shape, generator=torch.Generator().manual_seed(1))
    last = torch.zeros_like(batch.real)
    last[0, 12] = True
    given = student.run_batch(batch, last, 4, thresholds=thresholds)
    (of_price,) = torch.autograd.grad(given.loops_run, weight, retain_graph=True)
    (of_reply,) = torch.autograd.grad(given.logits[-1].logsumexp(-1).sum(), weight)
    assert of_price.any() and of_reply.any()
    with torch.no_grad():
        weight -= 0.01 * of_price
        cheaper = student.run_batch(batch, last, 4, thresholds=thresholds).loops_run
    assert cheaper < given.loops_run


def test_every_weight_of_the_student_is_taught_and_none_of_the_teachers():
    teacher, batch = teacher_of(), ragged()
    student = student_of(teacher)
    wanted = ask_teacher(teacher, batch, batch.real, 4, attention=True)
    for alpha in (0.5, 1.0):
        student.zero_grad()
        given = student.run_batch(batch, batch.real, 4, alpha, wanted.attention)
        (given.logits.square().mean() + given.distance).backward()
        missing = {key for key, weight in student.named_parameters() if weight.grad is None or not weight.grad.any()}
        assert missing == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    assert all(weight.grad is None for weight in teacher.parameters())


def run_batch(student, teacher, batch, checkpointed, **how):
    """Return a step's answers and gradients, and the bytes kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # which also keeps the address from being used again
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in student.parameters()}
    student.checkpoint_chunks = checkpointed
    wanted = ask_teacher(teacher, batch, batch.real, 3, attention=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        given = student.run_batch(batch, batch.real, 3, teacher_attention=wanted.attention, **how)
    loss = given.logits.square().mean() + given.distance
    if given.loops_run is not None:
        loss = loss + given.loops_run
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, materialize_grads=True)
    size = sum(each.untyped_storage().nbytes() for address, each in kept.items() if address not in weights)
    return [loss, given.logits, *gradients], size


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize("how", ["mixed", "melt", "decode-aware", "exits"])
def test_chunks_that_are_run_again_have_the_same_gradients_and_keep_less(mode, how):
    teacher, batch = teacher_of(), ragged()
    student = lively_gate(student_of(teacher, decode_mode=mode))
    thresholds = torch.rand(batch.real.shape, generator=torch.Generator().manual_seed(1))
    words = {"mixed": {"alpha": 0.4}, "melt": {}, "decode-aware": {"decode_aware": "tokens"}}
    words["exits"] = {"thresholds": thresholds}
    expected, everything = run_batch(student, teacher, batch, checkpointed=False, **words[how])
    given, little = run_batch(student, teacher, batch, checkpointed=True, **words[how])
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert little < everything / 5


def test_all_layers_and_loops_keep_the_same_masks_of_a_chunk():
    """One for all, for they are queries times keys, and do not shrink with d."""
    teacher, batch = teacher_of(), ragged((12,))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.shape[-2:] == (4, 12):  # of the last chunk
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student_of(teacher).run_batch(batch, batch.real, 4)
    assert len(kept) == 1


@torch.no_grad()
def test_decode_aware_replies_see_the_rows_that_decoding_sees():
    """As `generate` does it: the prompt in one call, then token by token."""
    tokenizer = build_tokenizer()
    batch = encode(list(islice(questions("train", 0, sentences=5), 1)), tokenizer)
    student = student_of(teacher_of(vocab_size=512), vocab_size=512, chunk_size=16)
    given = student.run_batch(batch, batch.before_reply, 4, decode_aware="tokens").logits[-1]
    length = int(batch.prompt_lengths[0])
    output = student(batch.input_ids[:, :length], use_cache=True)
    logits, rows = [output.logits[:, -1]], output.past_key_values
    for token in batch.input_ids[0, length:-1]:
        output = student(token.view(1, 1), past_key_values=rows, use_cache=True)
        logits.append(output.logits[:, -1])
    torch.testing.assert_close(given, torch.cat(logits), atol=1e-4, rtol=1e-4)
    on_grid = student.run_batch(batch, batch.before_reply, 4).logits[-1]
    assert not torch.allclose(given, on_grid, atol=1e-3)
