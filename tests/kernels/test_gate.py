"""The fused gate equals the readable one."""

import pytest
import torch

from melt_serve.config import MeltConfig
from melt_serve.kernels.gate import gate_blend
from melt_serve.modeling.gate import KVGate


@pytest.mark.parametrize("gate_type", ["elementwise", "scalar"])
@pytest.mark.parametrize(("rows", "hidden_size"), [(1, 8), (7, 64), (33, 100)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
@torch.no_grad()
def test_gate_blend_equals_the_reference_gate(gate_type, rows, hidden_size, dtype, tolerance):
    torch.manual_seed(0)
    gate = KVGate(MeltConfig(hidden_size=hidden_size, num_attention_heads=1, kv_gate_type=gate_type)).to(dtype)
    n, h = torch.randn(2, rows, hidden_size).to(dtype)
    blended = gate_blend(gate.input_proj(n) + gate.state_proj(h), h, n)
    assert blended.dtype == dtype
    torch.testing.assert_close(blended, gate(n, h, loop=2), atol=tolerance, rtol=0)


def test_z_of_one_keeps_the_state_and_z_of_zero_takes_the_input():
    n, h = torch.randn(2, 3, 4)
    torch.testing.assert_close(gate_blend(torch.full((3, 1), 1e4), h, n), h)
    torch.testing.assert_close(gate_blend(torch.full((3, 1), -1e4), h, n), n)
