"""On a CPU the engine runs vLLM's norm kernels, and they compute the native formula."""

import pytest
import torch
from vllm import ir
from vllm.config import CompilationMode

from melt_serve.engine import cpu_norms
from tests.engine.engines import generate, on, prompts

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def arguments(op, x, weight):
    residual = (torch.randn(x.shape).to(x.dtype),) if op is ir.ops.fused_add_rms_norm else ()
    return x, *residual, weight, 1e-6


OPS = pytest.mark.parametrize("op", [ir.ops.rms_norm, ir.ops.fused_add_rms_norm], ids=lambda op: op.name)


@OPS
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("hidden", [32, 96, 544])
def test_a_kernel_computes_the_native_formula(op, dtype, tokens, hidden):
    torch.manual_seed(0)
    given = arguments(op, torch.randn(tokens, hidden).to(dtype), torch.randn(hidden).to(dtype))
    kernel = op.impls[cpu_norms.PROVIDER]
    assert kernel.supported and kernel.supports_args(*given)
    computed, native = kernel.func_impl_fn(*given), op.impls["native"].impl_fn(*given)
    torch.testing.assert_close(computed, native, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@OPS
def test_rows_that_a_kernel_reads_wrongly_go_to_the_native_formula(op):
    takes = op.impls[cpu_norms.PROVIDER].supports_args
    weight = torch.ones(64)
    assert takes(*arguments(op, torch.randn(3, 64), weight))
    for x in (torch.randn(3, 128)[:, :64], torch.randn(3, 64).bfloat16(), torch.randn(3, 100)):
        assert not takes(*arguments(op, x, torch.ones(x.shape[-1])))


@on("token")
def test_an_eager_engine_runs_them_and_a_compiled_one_leaves_the_formula_to_its_compiler(served, monkeypatch):
    vllm_config = served.llm.llm_engine.vllm_config
    calls = {}
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        first = op._priority_impls[0]
        assert first.provider == cpu_norms.PROVIDER
        run = first.impl_fn
        monkeypatch.setattr(
            first, "impl_fn", lambda *given, run=run, op=op: (calls.update({op.name: True}), run(*given))[1]
        )
    generate(served.llm, prompts(5), max_tokens=1)
    assert calls == {"rms_norm": True, "fused_add_rms_norm": True}
    priority = vllm_config.kernel_config.ir_op_priority
    monkeypatch.setattr(priority, "rms_norm", ["native"])
    monkeypatch.setattr(vllm_config.compilation_config, "mode", CompilationMode.DYNAMO_TRACE_ONCE)
    cpu_norms.prefer_kernels(vllm_config)
    assert priority.rms_norm == ["native"]
