"""Where an engine's time goes, by part of the model. Runs in the child process, on its real engine.

A clock around every module, not PyTorch's profiler: on a CPU a module's operators have ended when it returns, and the
profiler doubles the time of the small ones and takes minutes and gigabytes for a round.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.sample.sampler import Sampler

from melt_serve.engine.gate import KVGate
from melt_serve.engine.looplm import LoopedForCausalLM

PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (LinearBase, "matmuls"),
    (Attention, "attention"),
    (KVGate, "gate, element-wise"),
    (RMSNorm, "norms"),
    (LoopedForCausalLM, "rotary, SwiGLU, Python"),
    (LogitsProcessor, "head and sampling"),
    (Sampler, "head and sampling"),
)
"""What is timed; a module's time is without that of the modules in it."""

GATE_MATMULS = "gate, matmuls"
OUTSIDE = "scheduler, inputs, Python"


def profile(models: Iterable[nn.Module], work: Callable[[], float]) -> dict[str, float]:
    """Measure the seconds of each part while `work` runs, which returns how long it took."""
    parts: dict[str, float] = defaultdict(float)
    inner: list[float] = [0.0]
    starts: list[float] = []

    def enter(*_: object) -> None:
        inner.append(0.0)
        starts.append(perf_counter())

    def leave(part: str, *_: object) -> None:
        seconds = perf_counter() - starts.pop()
        parts[part] += seconds - inner.pop()
        inner[-1] += seconds

    hooks: list[Any] = []
    for module, part in timed_modules(models):
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(partial(leave, part)))
    try:
        total = work()
    finally:
        for hook in hooks:
            hook.remove()
    parts[OUTSIDE] = total - inner[0]
    return parts


def timed_modules(models: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, str]]:
    """Yield every module that belongs to a part, with the part's name."""
    for model in models:
        in_gates = {linear for gate in model.modules() if isinstance(gate, KVGate) for linear in gate.children()}
        for module in model.modules():
            part = next((name for kind, name in PARTS if isinstance(module, kind)), None)
            if part is not None:
                yield module, GATE_MATMULS if module in in_gates else part
