"""The gradients of chunk-wise training, in float64, against models that build the same graph another way."""

import pytest
import torch

from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.modeling.looplm import rotary_tables, rotate
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.student import Student
from tests.modeling.plain import PlainMelt
from tests.tiny_models import tiny_looplm, tiny_melt, tokens

LENGTH = 11
LOOPS = 3
EXACT = {"atol": 1e-10, "rtol": 1e-8}


class TokenByToken(PlainMelt):
    """With weights that take gradients, and the models' own rotary angles, which are rounded to float32."""

    def __init__(self, model: MeltForCausalLM):
        super().__init__(model)
        self.weights = dict(model.named_parameters())

    def turned(self, heads: torch.Tensor, position: int) -> torch.Tensor:
        tables = rotary_tables(self.config, torch.tensor([[position]]), heads.dtype)
        return rotate(heads[None, :, None], tables)[0, :, 0]


def batch_of(ids: torch.Tensor) -> Batch:
    """Build one document, all of it to be learnt."""
    mask = torch.ones_like(ids)
    return Batch(ids, mask, ids, prompt_lengths=torch.tensor([3]), replies=ids.expand(4, -1))


def student_of(reference: MeltForCausalLM) -> Student:
    student = Student(reference.config).double()
    student.load_state_dict(reference.state_dict())
    return student


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute next-token cross-entropy of logits [S, V]."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of every weight, zero where the loss does not depend on it."""
    named = dict(model.named_parameters())
    given = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, given, strict=True))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() <= other.keys()
    for key, gradient in one.items():
        torch.testing.assert_close(gradient, other[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")
    assert sum(bool(gradient.any()) for gradient in one.values()) > len(one) / 2


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 64])
def test_chunks_have_the_gradients_of_one_graph_built_token_by_token(chunk_size):
    """Those that flow through the rows of earlier chunks among them."""
    reference, ids = tiny_melt(chunk_size=chunk_size).double(), tokens(1, LENGTH)
    student = student_of(reference)
    plain = TokenByToken(reference)
    pieces = [plain.chunk(piece, LOOPS) for piece in ids[0].split(chunk_size)]
    expected = gradients(reference, loss_of(torch.cat(pieces), ids))
    batch = batch_of(ids)
    given = student.run_batch(batch, batch.real, LOOPS).logits[-1]
    assert_same(gradients(student, loss_of(given, ids)), expected)


def test_chunks_of_one_token_have_the_gradients_of_the_exact_model():
    reference, ids = tiny_melt(chunk_size=1).double(), tokens(1, LENGTH)
    student, batch = student_of(reference), batch_of(ids)
    expected = gradients(reference, loss_of(reference.token_sequential(ids[0], loops=LOOPS), ids))
    given = student.run_batch(batch, batch.real, LOOPS).logits[-1]
    assert_same(gradients(student, loss_of(given, ids)), expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_at_alpha_0_loss_and_gradients_are_the_looplms(chunk_size):
    teacher, ids = tiny_looplm().double(), tokens(1, LENGTH)
    assert type(teacher) is OuroForCausalLM
    reference = tiny_melt(chunk_size=chunk_size).double()
    reference.load_state_dict(teacher.state_dict(), strict=False)
    student, batch = student_of(reference), batch_of(ids)
    wanted = loss_of(teacher(ids, loops=LOOPS).logits[0], ids)
    given = loss_of(student.run_batch(batch, batch.real, LOOPS, alpha=0.0).logits[-1], ids)
    torch.testing.assert_close(given, wanted)
    of_student = gradients(student, given)
    of_gate = [key for key in of_student if "kv_gate" in key]
    assert of_gate and not any(of_student.pop(key).any() for key in of_gate)
    assert_same(gradients(teacher, wanted), of_student)


def test_gradients_reach_earlier_chunks_only_through_their_rows():
    """What the last token says of the first one's embedding, it says through three chunks' final rows."""
    reference, ids = tiny_melt(chunk_size=4).double(), tokens(1, 12)
    student, batch = student_of(reference), batch_of(ids)
    logits = student.run_batch(batch, batch.real, LOOPS).logits[-1]
    first = int(ids[0, 0])
    assert first not in ids[0, 1:]
    gradient = gradients(student, logits[-1].logsumexp(-1))["model.embed_tokens.weight"]
    assert gradient[first].any()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_detached_rows_take_no_gradient_from_later_chunks(alpha, checkpointed):
    """The answers stay; the last token's says nothing of the first one's embedding, but still of its own chunk's."""
    reference, ids = tiny_melt(chunk_size=4).double(), tokens(1, 12)
    student, batch = student_of(reference), batch_of(ids)
    student.checkpoint_chunks = checkpointed
    whole = student.run_batch(batch, batch.real, LOOPS, alpha).logits
    logits = student.run_batch(batch, batch.real, LOOPS, alpha, detach_rows=True).logits
    torch.testing.assert_close(logits, whole, atol=0, rtol=0)
    first, ninth = int(ids[0, 0]), int(ids[0, 8])
    assert first not in ids[0, 1:]
    gradient = gradients(student, logits[-1, -1].logsumexp(-1))["model.embed_tokens.weight"]
    assert not gradient[first].any()
    assert gradient[ninth].any()
