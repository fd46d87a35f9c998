"""A base that is the teacher's own: the gradients that are taken are those of a whole student, and no other is."""

import pytest
import torch

from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.build import plain
from melt_serve.train.distil.phase import phase_losses
from melt_serve.train.distil.shared_base import ADAPTED, is_gate, merged, share_base
from melt_serve.train.distil.student import Student
from melt_serve.train.stages import Distillation
from tests.tiny_models import enliven, tiny_looplm, tiny_melt, tokens

EXACT = {"atol": 1e-10, "rtol": 1e-8}
MIXED = Distillation(steps=3, learning_rate=1.0, interpolate=True, loss_on="all")
ALIGNED = Distillation(steps=3, learning_rate=1.0, alignment=0.5, loss_on="all")


def student_of(teacher):
    student = Student(tiny_melt().config).double()
    student.load_state_dict(tiny_melt().double().state_dict())
    student.load_state_dict({key: each for key, each in teacher.state_dict().items() if not is_gate(key)}, strict=False)
    return student.train()


def adapted(teacher, rank=3):
    """A student with adapters that have learnt something."""
    student = student_of(teacher)
    share_base(student, teacher, rank)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in student.named_parameters():
            if ".lora_B" in key:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return student


def gradients(student, teacher, stage):
    """The loss of a batch of phase 1 or 2, and its gradient by every weight that is trained."""
    ids = tokens(1, 11)
    batch = Batch(ids, torch.ones_like(ids), ids, prompt_lengths=torch.tensor([3]), replies=ids.expand(4, -1))
    loss = phase_losses(stage, 1, 0, teacher, student, batch, 11, batch.real.sum())["loss"]
    trained = {key: weight for key, weight in student.named_parameters() if weight.requires_grad}
    given = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
    return loss, dict(zip(trained, given, strict=True))


@pytest.mark.parametrize("stage", [MIXED, ALIGNED], ids=["phase 1", "phase 2"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_beside_a_frozen_base_the_gates_have_the_gradients_of_a_whole_student(stage, recomputed):
    teacher = tiny_looplm().double().requires_grad_(False)
    whole, frozen = student_of(teacher), student_of(teacher)
    share_base(frozen, teacher, None)
    whole.checkpoint_chunks = frozen.checkpoint_chunks = recomputed
    (expected, of_whole), (loss, of_gates) = (gradients(each, teacher, stage) for each in (whole, frozen))
    torch.testing.assert_close(loss, expected, **EXACT)
    assert of_gates.keys() == {key for key in of_whole if is_gate(key)}
    for key, gradient in of_gates.items():
        torch.testing.assert_close(gradient, of_whole[key], **EXACT)
    assert sum(bool(gradient.any()) for gradient in of_gates.values()) == 3 * 2  # W_z, b_z and U_z of two layers


@pytest.mark.parametrize("stage", [MIXED, ALIGNED], ids=["phase 1", "phase 2"])
def test_adapters_have_the_gradients_of_the_weights_that_they_are_merged_into(stage):
    """Of W + B A: that of B is G A^T, that of A is B^T G."""
    teacher = tiny_looplm().double().requires_grad_(False)
    student, whole = adapted(teacher), student_of(teacher)
    whole.load_state_dict(merged(student.state_dict()))
    (expected, of_whole), (loss, given) = (gradients(each, teacher, stage) for each in (whole, student))
    torch.testing.assert_close(loss, expected, **EXACT)
    for layer in range(2):
        for name in ADAPTED:
            key = f"model.layers.{layer}.self_attn.{name}"
            one, gradient = student.get_submodule(key), of_whole[f"{key}.weight"]
            torch.testing.assert_close(given[f"{key}.lora_B.weight"], gradient @ one.lora_A.weight.T, **EXACT)
            torch.testing.assert_close(given[f"{key}.lora_A.weight"], one.lora_B.weight.T @ gradient, **EXACT)
            assert given[f"{key}.lora_A.weight"].any()


def test_fresh_adapters_change_nothing_and_merged_ones_answer_as_beside_the_base():
    teacher, ids = tiny_looplm().double().requires_grad_(False), tokens(2, 13)
    fresh = student_of(teacher)
    expected = fresh(ids).logits
    share_base(fresh, teacher, 3)
    torch.testing.assert_close(fresh(ids).logits, expected, **EXACT)
    student = adapted(teacher)
    given = student(ids).logits
    melt = plain(student)
    assert melt.state_dict().keys() == tiny_melt().state_dict().keys()
    torch.testing.assert_close(melt.double()(ids).logits, given, atol=1e-4, rtol=1e-4)
    assert (given - expected).abs().max() > 1e-2


def test_the_bases_weights_lie_in_memory_once_wherever_the_teacher_goes():
    teacher = tiny_looplm(tie_word_embeddings=True).requires_grad_(False)
    student = Student(enliven(tiny_melt(tie_word_embeddings=True)).config)
    share_base(student, teacher, 3)
    teacher.to(torch.bfloat16)
    of_student, of_teacher = (dict(each.named_parameters(remove_duplicate=False)) for each in (student, teacher))
    shared = [key for key in of_teacher if not is_gate(key)]
    assert "lm_head.weight" in shared and all(of_student[key] is of_teacher[key] for key in shared)
    for key in of_student.keys() - shared:
        assert of_student[key].requires_grad and of_student[key].dtype == torch.float32, key
