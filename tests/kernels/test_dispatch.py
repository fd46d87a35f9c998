"""`MELT_KERNELS` picks, and what cannot run says so."""

import subprocess
import sys

import pytest
import torch

from melt_serve.kernels.dispatch import KernelError, chosen, takes_triton, triton
from melt_serve.kernels.gate import gate_blend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_by_itself_a_gpu_gets_triton_and_a_cpu_the_reference(monkeypatch):
    monkeypatch.delenv("MELT_KERNELS", raising=False)
    assert chosen() == "auto"
    assert not takes_triton("a kernel", CPU)
    assert takes_triton("a kernel", GPU) is (triton is not None)


def test_the_reference_can_be_asked_for_everywhere(monkeypatch):
    monkeypatch.setenv("MELT_KERNELS", "reference")
    assert not takes_triton("a kernel", CPU) and not takes_triton("a kernel", GPU)


def test_triton_on_a_cpu_is_an_error_that_names_the_interpreter(monkeypatch):
    monkeypatch.setenv("MELT_KERNELS", "triton")
    logits, h, n = torch.randn(3, 2, 4)
    with pytest.raises(KernelError, match=r"MELT_KERNELS=triton cannot run gate_blend: .*TRITON_INTERPRET=1"):
        gate_blend(logits, logits, logits[0], h, n)


@pytest.mark.parametrize("word", ["", "cuda", "Triton"])
def test_any_other_word_is_an_error_that_lists_them(monkeypatch, word):
    monkeypatch.setenv("MELT_KERNELS", word)
    with pytest.raises(KernelError, match=f"MELT_KERNELS='{word}' is none of auto, triton, reference"):
        chosen()


@pytest.mark.skipif(triton is None, reason="no Triton")
def test_tensors_a_kernel_does_not_take_are_never_passed_over_in_silence(monkeypatch):
    monkeypatch.setenv("MELT_KERNELS", "auto")
    with pytest.warns(UserWarning, match="a kernel does not run in Triton: its tensors are round"):
        assert not takes_triton("a kernel", GPU, lambda: "its tensors are round")
    monkeypatch.setenv("MELT_KERNELS", "triton")
    with pytest.raises(KernelError, match="MELT_KERNELS=triton cannot run a kernel: its tensors are round"):
        takes_triton("a kernel", GPU, lambda: "its tensors are round")


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None
import torch
from melt_serve.kernels.gate import gate_blend
from melt_serve.kernels.rows import write_rows
from melt_serve.kernels.dispatch import KernelError, takes_triton
x = torch.ones(2, 4)
print(gate_blend(x, x, x[0], x, x).sum().item())
warnings.simplefilter("error")
try:
    takes_triton("a kernel", torch.device("cuda"))
except UserWarning as warning:
    print(warning)
"""


def test_without_triton_the_references_run():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["8.0", "a kernel does not run in Triton: Triton is not installed"]


@torch.no_grad()
def test_on_a_cpu_a_compiled_graph_holds_the_reference_for_its_compiler_to_fuse(monkeypatch):
    monkeypatch.delenv("MELT_KERNELS", raising=False)
    torch.compiler.reset()
    from_input, from_state, h, n = torch.randn(4, 3, 6)
    compiled = torch.compile(gate_blend, fullgraph=True, backend="eager")
    arguments = (from_input, from_state, from_input[0], h, n)
    assert torch.equal(compiled(*arguments), gate_blend(*arguments))


@pytest.mark.skipif(triton is None, reason="no Triton")
@pytest.mark.parametrize(("word", "takes"), [("auto", False), ("triton", True), ("reference", False)])
def test_a_compiled_graph_for_a_gpu_gets_the_formula_unless_triton_is_asked_for(monkeypatch, word, takes):
    monkeypatch.setenv("MELT_KERNELS", word)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + takes_triton("a kernel", GPU), fullgraph=True, backend="eager")
    assert bool(compiled(torch.zeros(1))) is takes
    assert takes_triton("a kernel", GPU) is (word != "reference")
