"""A student in training has the reference model's loss and gradients, whatever computes its gate."""

import pytest
import torch

from melt_serve.modeling import MeltForCausalLM
from melt_serve.train.distil.student import Student
from tests.kernels.device import DEVICE, TRITON
from tests.tiny_models import tiny_melt, tokens


@pytest.fixture
def calls(monkeypatch):
    """Record the states that the fused gate blends."""
    from melt_serve.train.distil import student

    seen = []
    fused = student.gate_blend
    monkeypatch.setattr(student, "gate_blend", lambda *inputs: seen.append(inputs[-1].shape) or fused(*inputs))
    return seen


@pytest.mark.parametrize(
    ("gate_type", "bias"),
    [("elementwise", "shared"), ("scalar", "shared"), ("mean", "shared"), ("elementwise", "loop"), ("scalar", "loop")],
)
def test_loss_and_gradients_are_the_reference_models(gate_type, bias, calls):
    reference = tiny_melt(kv_gate_type=gate_type, kv_gate_bias=bias, num_hidden_layers=1).double().to(DEVICE)
    student = Student(reference.config).double().to(DEVICE)
    student.load_state_dict(reference.state_dict())
    ids = tokens(2, 6).to(DEVICE)

    def learn(model: MeltForCausalLM):
        loss = model(ids, labels=ids, loops=3).loss
        loss.backward()
        return loss

    torch.testing.assert_close(learn(student), learn(reference))
    for (name, one), other in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    blends = 2 * 2 if TRITON and gate_type != "mean" else 0  # loops 2 and 3 of two chunks
    assert len(calls) == blends
