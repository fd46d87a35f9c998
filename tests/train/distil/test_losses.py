"""The losses, against their definitions written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from melt_serve.train.distil import losses
from melt_serve.train.distil.losses import (
    cross_entropy_over_loops,
    distillation,
    distillation_from_states,
    squared_distance,
)


def test_distillation_is_the_mean_kl_over_loops_and_tokens():
    teacher, student = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    by_hand = sum(
        p[t, i, v] * (p[t, i, v].log() - q[t, i, v].log()) for t in range(3) for i in range(5) for v in range(7)
    )
    torch.testing.assert_close(distillation(teacher, student).double(), by_hand / 15, atol=1e-6, rtol=1e-5)
    assert distillation(teacher, teacher).abs() < 1e-7
    assert not torch.isclose(distillation(teacher, student), distillation(student, teacher))


@pytest.mark.parametrize("answers", [1, 4, 5, 15, 100])
def test_slices_of_logits_have_the_loss_and_the_gradients_of_all_at_once(answers, monkeypatch):
    """Of 3 loops of 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher, student, teacher_head, head = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 5, 8), (3, 5, 8), (7, 8), (7, 8))
    )
    student.requires_grad_(), head.requires_grad_()
    expected = 3 * distillation(F.linear(teacher, teacher_head), F.linear(student, head), 9)
    monkeypatch.setattr(losses, "ANSWERS_AT_ONCE", answers)
    given = 3 * distillation_from_states(teacher, teacher_head, student, head, 9)
    torch.testing.assert_close(given, expected, atol=1e-12, rtol=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, (student, head)) for loss in (given, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_no_more_logits_than_a_slice_exist(monkeypatch):
    """In the forward pass and the backward."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            made = operation(*arguments, **(keywords or {}))
            sizes.extend(each.numel() for each in pytree.tree_leaves(made) if isinstance(each, torch.Tensor))
            return made

    monkeypatch.setattr(losses, "ANSWERS_AT_ONCE", 2)
    states, head = torch.randn(3, 40, 2, requires_grad=True), torch.randn(50, 2, requires_grad=True)
    with Sizes():
        distillation_from_states(torch.randn(3, 40, 2), torch.randn(50, 2), states, head).backward()
    assert max(sizes) == states.numel() > 2 * 50 and 2 * 50 in sizes


def test_cross_entropy_is_the_mean_over_loops_and_tokens():
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    by_hand = [-logits[t, i].log_softmax(-1)[targets[t, i]] for t in range(3) for i in range(5)]
    torch.testing.assert_close(cross_entropy_over_loops(logits, targets), torch.stack(by_hand).mean())


def test_the_distance_counts_members_and_spares_the_teacher():
    teacher, student = torch.randn(2, 2, 3, 4, requires_grad=True)
    members = torch.tensor([[True, True, False], [True, False, False]])
    distance = squared_distance(teacher, student, members, "sum")
    places = ((0, 0), (0, 1), (1, 0))
    by_hand = [((teacher - student)[place] ** 2).sum() for place in places]
    torch.testing.assert_close(distance, sum(by_hand))
    torch.testing.assert_close(squared_distance(teacher, student, members, "mean"), sum(by_hand) / 4)
    shares = [square / (teacher[place] ** 2).sum() for square, place in zip(by_hand, places, strict=True)]
    torch.testing.assert_close(squared_distance(teacher, student, members, "relative"), sum(shares))
    of_teacher, of_student = torch.autograd.grad(distance, (teacher, student), allow_unused=True)
    assert of_teacher is None and of_student is not None
    assert (of_student[~members] == 0).all() and (of_student[members] != 0).all()


def test_a_relative_distance_has_no_scale_and_bears_outputs_of_nothing():
    """The teacher's scale, width and layer leave it as it is; the summed square grows with them."""
    teacher, student = torch.randn(2, 2, 3, 8)
    members = torch.ones(2, 3, dtype=torch.bool)
    for scale in (10.0, 0.1):
        scaled = squared_distance(scale * teacher, scale * student, members, "relative")
        expected = squared_distance(teacher, student, members, "relative")
        torch.testing.assert_close(scaled, expected, atol=0, rtol=1e-3)
    wider = (torch.cat((each, each), dim=-1) for each in (teacher, student))
    torch.testing.assert_close(
        squared_distance(*wider, members, "relative"), squared_distance(teacher, student, members, "relative")
    )
    assert squared_distance(0 * teacher, 0 * student, members, "relative") == 0
