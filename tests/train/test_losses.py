"""The losses, against their definitions written out."""

import torch

from melt_serve.train.losses import cross_entropy_over_loops, distillation, squared_distance


def test_distillation_is_the_mean_kl_over_loops_and_tokens():
    teacher, student = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    by_hand = sum(
        p[t, i, v] * (p[t, i, v].log() - q[t, i, v].log()) for t in range(3) for i in range(5) for v in range(7)
    )
    torch.testing.assert_close(distillation(teacher, student).double(), by_hand / 15, atol=1e-6, rtol=1e-5)
    assert distillation(teacher, teacher).abs() < 1e-7
    assert not torch.isclose(distillation(teacher, student), distillation(student, teacher))


def test_cross_entropy_is_the_mean_over_loops_and_tokens():
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    by_hand = [-logits[t, i].log_softmax(-1)[targets[t, i]] for t in range(3) for i in range(5)]
    torch.testing.assert_close(cross_entropy_over_loops(logits, targets), torch.stack(by_hand).mean())


def test_the_distance_counts_members_and_spares_the_teacher():
    teacher, student = torch.randn(2, 2, 3, 4, requires_grad=True)
    members = torch.tensor([[True, True, False], [True, False, False]])
    distance = squared_distance(teacher, student, members)
    by_hand = sum(((teacher - student)[b, i] ** 2).sum() for b, i in ((0, 0), (0, 1), (1, 0)))
    torch.testing.assert_close(distance, by_hand)
    of_teacher, of_student = torch.autograd.grad(distance, (teacher, student), allow_unused=True)
    assert of_teacher is None and of_student is not None
    assert (of_student[~members] == 0).all() and (of_student[members] != 0).all()
