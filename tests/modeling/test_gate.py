"""The KV gate does what melt_serve/modeling/README.md says, to the digit."""

import math

import pytest
import torch

from melt_serve.config import MeltConfig
from melt_serve.modeling.gate import GATE_BIAS, GATE_WEIGHT_STD, KVGate
from tests.tiny_models import SHAPE, tiny_melt, tokens

GATE_TYPES = ("elementwise", "scalar", "mean", "ema", "last")


def gate(gate_type: str, initial_state: str = "input", hidden_size: int = 2) -> KVGate:
    shape = {"hidden_size": hidden_size, "num_attention_heads": 1}
    config = MeltConfig(**shape, kv_gate_type=gate_type, kv_gate_initial_state=initial_state)
    return KVGate(config).requires_grad_(False)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_elementwise_gate_by_hand():
    by_hand = gate("elementwise")
    by_hand.input_proj.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    by_hand.input_proj.bias.copy_(torch.tensor([0.5, -0.5]))
    by_hand.state_proj.weight.copy_(torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    n, h = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 4.0])
    z = sigmoid(1 - 2 + 4 + 0.5), sigmoid(1 + 6 - 0.5)
    expected = torch.tensor([z[0] * 2 + (1 - z[0]) * 1, z[1] * 4 + (1 - z[1]) * -1])
    torch.testing.assert_close(by_hand(n, h, loop=2), expected)


def test_the_scalar_gate_by_hand():
    by_hand = gate("scalar")
    by_hand.input_proj.weight.copy_(torch.tensor([[1.0, 2.0]]))
    by_hand.input_proj.bias.copy_(torch.tensor([0.5]))
    by_hand.state_proj.weight.copy_(torch.tensor([[0.5, -1.0]]))
    n, h = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 4.0])
    z = sigmoid(1 - 2 + 1 - 4 + 0.5)
    torch.testing.assert_close(by_hand(n, h, loop=2), torch.tensor([z * 2 + (1 - z), z * 4 - (1 - z)]))


def run(module: KVGate, inputs: torch.Tensor) -> torch.Tensor:
    h = None
    for loop, n in enumerate(inputs, start=1):
        h = module(n, h, loop)
    return h


def test_mean_is_the_mean_of_all_loops_inputs():
    inputs = torch.randn(5, 3, 2)
    torch.testing.assert_close(run(gate("mean"), inputs), inputs.mean(0))
    torch.testing.assert_close(run(gate("mean", "zeros"), inputs), inputs.mean(0))


def test_ema_keeps_a_fifth_of_the_old_state():
    first, second, third = inputs = torch.randn(3, 4, 2)
    expected = 0.2 * (0.2 * first + 0.8 * second) + 0.8 * third
    torch.testing.assert_close(run(gate("ema"), inputs), expected)


def test_last_takes_the_last_loops_input():
    inputs = torch.randn(3, 4, 2)
    assert torch.equal(run(gate("last"), inputs), inputs[-1])


@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_from_the_input_the_first_loop_skips_the_gate(gate_type):
    n = torch.randn(3, 2)
    assert torch.equal(gate(gate_type)(n, None, 1), n)


@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_from_zeros_the_first_loop_is_gated(gate_type):
    module, n = gate(gate_type, "zeros"), torch.randn(3, 2)
    torch.testing.assert_close(module(n, None, 1), module(n, torch.zeros_like(n), 1))
    blends = gate_type in ("elementwise", "scalar", "ema")
    assert torch.allclose(module(n, None, 1), n) is not blends


def test_a_fresh_gate_starts_close_to_last():
    torch.manual_seed(0)
    layer = type(tiny_melt())(MeltConfig(**SHAPE)).model.layers[1].self_attn.kv_gate
    assert torch.all(layer.input_proj.bias == GATE_BIAS)
    for weight in (layer.input_proj.weight, layer.state_proj.weight):
        assert weight.std().item() == pytest.approx(GATE_WEIGHT_STD, rel=0.1)
    n, h = torch.randn(2, 100, 64)
    assert layer.keep(n, h, 2).mean().item() == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize("gate_type", GATE_TYPES[:-1])
def test_every_gate_type_answers_otherwise_than_last(gate_type):
    prompt = tokens(1, 6)
    other, last = tiny_melt(kv_gate_type=gate_type), tiny_melt(kv_gate_type="last")
    assert (other(prompt).logits - last(prompt).logits).abs().max() > 0.1
