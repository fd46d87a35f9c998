"""The KV gate does what melt_serve/modeling/README.md says, to the digit."""

import math

import pytest
import torch

from melt_serve.config import MeltConfig
from melt_serve.modeling.gate import GATE_BIAS, KVGate, fresh_weight_std
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


def test_a_bias_a_loop_by_hand():
    config = MeltConfig(hidden_size=2, num_attention_heads=1, max_loops=4, kv_gate_bias="loop")
    by_hand = KVGate(config).requires_grad_(False)
    by_hand.input_proj.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    by_hand.state_proj.weight.copy_(torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    by_hand.loop_bias.copy_(torch.tensor([[0.5, -0.5], [2.0, 1.0], [-3.0, 0.0]]))
    n, h = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 4.0])
    for loop, bias in ((2, (0.5, -0.5)), (3, (2.0, 1.0)), (4, (-3.0, 0.0))):
        z = sigmoid(1 - 2 + 4 + bias[0]), sigmoid(1 + 6 + bias[1])
        expected = torch.tensor([z[0] * 2 + (1 - z[0]) * 1, z[1] * 4 + (1 - z[1]) * -1])
        torch.testing.assert_close(by_hand(n, h, loop), expected)


@pytest.mark.parametrize(("gate_type", "rank"), [("elementwise", None), ("scalar", None), ("elementwise", 24)])
@torch.no_grad()
def test_a_fresh_gate_with_a_bias_a_loop_is_nearly_the_running_mean(gate_type, rank):
    """In a whole model, for transformers makes its weights once more; exactly the mean without W_z and U_z."""
    torch.manual_seed(0)
    config = MeltConfig(**SHAPE, max_loops=8, kv_gate_type=gate_type, kv_gate_bias="loop", kv_gate_rank=rank)
    fresh, inputs = type(tiny_melt())(config).model.layers[1].self_attn.kv_gate, torch.randn(8, 50, 64)
    keeps = fresh.keep(inputs[0], inputs[1], 4)
    assert keeps.mean().item() == pytest.approx(3 / 4, abs=0.02) and 0.01 < keeps.std().item() < 0.1
    for loops in (2, 5, 8):
        assert (run(fresh, inputs[:loops]) - inputs[:loops].mean(0)).std() < 0.15
    fresh.input_proj.weight.zero_()
    fresh.state_proj.weight.zero_()
    for loops in (2, 5, 8):
        torch.testing.assert_close(run(fresh, inputs[:loops]), inputs[:loops].mean(0))


@pytest.mark.parametrize(("width", "rank"), [(48, None), (768, None), (768, 8), (192, 96)])
@torch.no_grad()
def test_a_fresh_gates_logits_are_as_spread_at_any_width_and_rank(width, rank):
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 8}
    gate = type(tiny_melt())(MeltConfig(**shape, kv_gate_rank=rank)).model.layers[0].self_attn.kv_gate
    from_state = gate.state_proj(gate.state_down(torch.randn(400, width)))
    assert from_state.std().item() == pytest.approx(0.02 * 192**0.5, rel=0.1)


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
        assert weight.std().item() == pytest.approx(fresh_weight_std(MeltConfig(**SHAPE)), rel=0.1)
    n, h = torch.randn(2, 100, 64)
    assert layer.keep(n, h, 2).mean().item() == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize("gate_type", GATE_TYPES[:-1])
def test_every_gate_type_answers_otherwise_than_last(gate_type):
    prompt = tokens(1, 6)
    other, last = tiny_melt(kv_gate_type=gate_type), tiny_melt(kv_gate_type="last")
    assert (other(prompt).logits - last(prompt).logits).abs().max() > 0.1
