"""The fused gate equals the readable one, its gradient too, for whatever tensors the engine and training pass."""

import pytest
import torch
import torch.nn.functional as F

from melt_serve.config import MeltConfig
from melt_serve.kernels.dispatch import KernelError, chosen
from melt_serve.kernels.gate import gate_blend
from melt_serve.modeling.gate import KVGate
from tests.kernels.device import DEVICE, needs_triton

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GATES = ("elementwise", "scalar")
# One token, sizes that no block divides, one more than a block, one column.
SHAPES = [(1, 8), (7, 64), (17, 100), (3, 1026), (2, 1)]


def gate_of(gate_type, hidden_size, dtype=torch.float64) -> KVGate:
    torch.manual_seed(0)
    gate = KVGate(MeltConfig(hidden_size=hidden_size, num_attention_heads=1, kv_gate_type=gate_type))
    return gate.to(DEVICE, dtype)


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, *shape, dtype=torch.float64).to(DEVICE, dtype)


def fused(gate, n, h, **options):
    from_input = F.linear(n, gate.input_proj.weight)
    return gate_blend(from_input, gate.state_proj(h), gate.input_proj.bias, h, n, **options)


@pytest.mark.parametrize("gate_type", GATES)
@pytest.mark.parametrize(("tokens", "hidden_size"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_gate_blend_equals_the_reference_gate(gate_type, tokens, hidden_size, dtype):
    n, h = inputs(tokens, hidden_size, dtype=dtype)
    gate = gate_of(gate_type, hidden_size, dtype)
    blended = fused(gate, n, h)
    assert blended.dtype == dtype
    exact = gate.double()(n.double(), h.double(), loop=2)
    torch.testing.assert_close(blended.double(), exact, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("gate_type", GATES)
@torch.no_grad()
def test_views_as_the_engine_and_training_have_them(gate_type):
    gate = gate_of(gate_type, 24)
    stack = inputs(3, 10, 24)[0]
    n, h = inputs(10, 24)
    wide = torch.cat((F.linear(n, gate.input_proj.weight), n), dim=-1)  # a part of one wider matmul's output
    width = gate.input_proj.weight.shape[0]
    for state in (h, stack[1], stack.transpose(0, 1)[:, 2], torch.cat((h, h), dim=1)[:, 24:], h[:1].expand(10, -1)):
        blended = gate_blend(wide[:, :width], gate.state_proj(state), gate.input_proj.bias, state, n)
        torch.testing.assert_close(blended, gate(n, state, loop=2))
    n, h = inputs(2, 5, 24)
    torch.testing.assert_close(fused(gate, n, h), gate(n, h, loop=2))
    torch.testing.assert_close(fused(gate, n[:, 1:4], h[:, 1:4]), gate(n, h, loop=2)[:, 1:4])


@pytest.mark.parametrize("gate_type", GATES)
@torch.no_grad()
def test_the_state_can_be_overwritten(gate_type):
    gate, (n, stack) = gate_of(gate_type, 24), inputs(3, 5, 24)
    n, others = n[0], stack[::2].clone()
    expected = gate(n, stack[1], loop=2)
    assert fused(gate, n, stack[1], out=stack[1]).data_ptr() == stack[1].data_ptr()
    torch.testing.assert_close(stack[1], expected)
    assert torch.equal(stack[::2], others)


@pytest.mark.parametrize("gate_type", GATES)
def test_no_tokens_are_no_error(gate_type):
    gate, (n, h) = gate_of(gate_type, 8), inputs(0, 8)
    blended = fused(gate, n, h)
    assert blended.shape == (0, 8)
    blended.sum().backward()
    assert not gate.input_proj.weight.grad.any()


def test_z_of_one_keeps_the_state_and_z_of_zero_takes_the_input():
    n, h = inputs(3, 4)
    zero = torch.zeros(3, 1, dtype=n.dtype, device=DEVICE)
    assert torch.equal(gate_blend(zero, zero, zero[0] + 1e4, h, n), h)
    assert torch.equal(gate_blend(zero, zero, zero[0] - 1e4, h, n), n)


@pytest.mark.parametrize("width", [1, 3])
def test_the_gradient_is_that_of_the_formula(width):
    logits, states = inputs(2, width), inputs(2, 3)
    arguments = [each.clone().requires_grad_() for each in (*logits, logits[0, 0], *states)]
    assert torch.autograd.gradcheck(gate_blend, arguments)


@pytest.mark.parametrize("hidden_size", [40, 1026])
@pytest.mark.parametrize(
    ("gate_type", "dtype", "tolerance"),
    [("elementwise", torch.float32, 1e-5), ("scalar", torch.float32, 1e-5), ("elementwise", torch.bfloat16, 5e-2)],
    ids=str,
)
def test_weights_and_states_get_the_gradients_of_the_reference_gate_in_float64(
    gate_type, hidden_size, dtype, tolerance
):
    def gradients(gate, n, h, run):
        n, h = n.detach().requires_grad_(), h.detach().requires_grad_()
        (run(gate, n, h) * weights.to(n.dtype)).sum().backward()
        return [each.grad.double() for each in (n, h, *gate.parameters())]

    n, h = inputs(2, 7, hidden_size, dtype=dtype)
    weights = inputs(2, 7, hidden_size, dtype=dtype)[0].flip(0)
    gate = gate_of(gate_type, hidden_size, dtype)
    given = gradients(gate, n, h, fused)
    exact_gate = gate_of(gate_type, hidden_size, dtype).double()
    exact = gradients(exact_gate, n.double(), h.double(), lambda gate, n, h: gate(n, h, loop=2))
    for one, other in zip(given, exact, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("gate_type", GATES)
@torch.no_grad()
def test_what_the_kernel_does_not_take_goes_to_the_reference_or_is_refused(gate_type):
    """Mixed dtypes, columns that are not neighbours in memory, outputs that are no rows."""
    gate, (n, h) = gate_of(gate_type, 6), inputs(2, 6)
    bias, zero = gate.input_proj.bias, torch.zeros_like(gate.state_proj(h))
    sparse = inputs(6, 2)[0].T
    cases = {
        "not of one float dtype": lambda: gate_blend(zero, zero, bias.float(), h, n),
        "not contiguous": lambda: gate_blend(zero, zero, bias, sparse, n),
        "strides": lambda: gate_blend(
            zero[None], zero[None], bias, h[None], n[None], out=inputs(1, 6, 2)[0].transpose(1, 2)
        ),
    }
    for says, call in cases.items():
        if chosen() == "triton":
            with pytest.raises(KernelError, match=says):
                call()
        else:
            state = sparse if says == "not contiguous" else h
            z = torch.sigmoid(bias)
            torch.testing.assert_close(call().view(2, 6), z * state + (1 - z) * n)


@needs_triton
def test_pytorchs_compiler_keeps_it_as_one_operator():
    torch.compiler.reset()
    logits, states = inputs(2, 3), inputs(2, 3)
    arguments = [each.clone().requires_grad_() for each in (*logits, logits[0, 0], *states)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.melt_serve.gate_blend, arguments, test_utils=checks)
    graphs = []

    def look(graph, _):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(gate_blend, fullgraph=True, backend=look)
    assert torch.equal(compiled(*arguments), gate_blend(*arguments))
    assert graphs[0].count("torch.ops.melt_serve.gate_blend") == 1 and "sigmoid" not in graphs[0]
