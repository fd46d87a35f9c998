"""Triton's own compiler makes machine code of every kernel for a Hopper GPU; that needs no GPU."""

import pytest

from melt_serve.kernels import gate, norms, rows
from melt_serve.kernels.dispatch import INTERPRETED, tl, triton

pytestmark = pytest.mark.skipif(triton is None or INTERPRETED, reason="no Triton compiler")

HOPPER = ("cuda", 90, 32)
GATE = "gradient from_input from_state bias h n out of_logits of_h of_n"
TENSORS = f"{GATE} x residual closing opening q k v table k_cache v_cache".split()


def machine_code(kernel, constants, **types):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, types["tensors"] if name in TENSORS else "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    return triton.compile(source, target=GPUTarget(*HOPPER)).asm["cubin"]


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_the_gate_and_its_gradient(dtype, scalar):
    constants = {"SCALAR": scalar, "WIDE": tl.float64 if dtype == "fp64" else tl.float32, "BLOCK_SIZE": 1024}
    for kernel in (gate.forward_kernel, gate.backward_kernel):
        assert machine_code(kernel, constants, tensors=f"*{dtype}")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_norms(dtype):
    assert machine_code(norms.kernel, {"BLOCK_SIZE": 2048}, tensors=f"*{dtype}", epsilon="fp32")


@pytest.mark.parametrize("cache", ["bf16", "fp8e4nv"])
def test_rows(cache):
    constants = {"HEADS": 16, "KV_HEADS": 16, "HALF": 40, "PLACES": 16, "Q_PROGRAMS": 1, "MOST": 448.0}
    constants |= {"TOGETHER": 16, "PAIRS": 64}
    types = {"tensors": "*bf16", "positions": "*i64", "slots": "*i64", "k_scale": "*fp32", "v_scale": "*fp32"}
    if cache == "bf16":
        constants |= {"k_scale": None, "v_scale": None}
    assert machine_code(rows.kernel, constants, **types, k_cache=f"*{cache}", v_cache=f"*{cache}")
