"""What a decode step launches on a GPU, counted on a CPU: `test_gpu_runner.py` runs this in Triton's interpreter.

Counted is what runs inside the model's `forward` in a step of one token: every operator of PyTorch's that is not a view
and does not only allocate; every operator of vLLM's (`_C`, `vllm`) as one, since each is one kernel on a GPU (attention
may be two: it splits a long context); every launch of a Triton kernel of ours. So that operators are a GPU's, weights
stay as they are loaded (a CPU packs them), SwiGLU is vLLM's kernel, and attention is vLLM's Triton backend.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from vllm.model_executor.layers import activation

from melt_serve.engine import attention
from melt_serve.engine.looplm import OuroModel
from melt_serve.engine.melt import MeltModel
from tests.engine.engines import RIGHT, distance, engine, generate, keep_weights, prompts, save_looplm, save_melt
from tests.engine.gpu_runner import triton_attention  # noqa: F401 (a fixture)

LAYERS, LOOPS = 24, 4
"""Of MELT-1.6B, as the paper runs it."""
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "lift_fresh", "alias")


class Launches(TorchDispatchMode):
    """Counts the kernels that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()
        self.inside = False

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        name = operator._schema.name.split("::")[-1]
        if not operator.is_view and name not in ALLOCATIONS:
            self.counted[name] += 1
        self.inside = True
        try:
            return operator(*arguments, **(keywords or {}))
        finally:
            self.inside = False


@pytest.fixture
def launches(monkeypatch):
    """Run the engine's operators as a GPU has them; give what the last step of one token launched."""
    last = Counter()
    current = None
    launch = GridExecutor.__call__

    def counting(forward):
        def count(model, input_ids, positions, *arguments, **keywords):
            nonlocal current
            with Launches() as current:
                output = forward(model, input_ids, positions, *arguments, **keywords)
            if len(positions) == 1:
                last.clear()
                last.update(current.counted)
            current = None
            return output

        return count

    def count_launch(executor, *arguments, **keywords):
        if current is not None and not current.inside:
            current.counted[executor.fn.__module__] += 1
        with _disable_current_modes():
            return launch(executor, *arguments, **keywords)

    monkeypatch.setenv("MELT_KERNELS", "triton")
    for model in (MeltModel, OuroModel):
        monkeypatch.setattr(model, "forward", counting(model.forward))
    monkeypatch.setattr(GridExecutor, "__call__", count_launch)
    keep_weights(monkeypatch)
    monkeypatch.setattr(activation.SiluAndMul, "forward_native", swiglu)
    return last


def swiglu(self, x):
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype)
    torch.ops._C.silu_and_mul(out, x)
    return out


@pytest.mark.usefixtures("triton_attention")
@pytest.mark.parametrize(("fused", "most"), [(False, 1250), (True, 1150)], ids=["rows-by-vllm", "rows-by-our-kernel"])
def test_a_decode_step_launches_few_kernels(tmp_path, monkeypatch, launches, fused, most):
    monkeypatch.setattr(attention, "fuses_rows", lambda layer: fused)
    model, asked = save_melt(tmp_path, num_hidden_layers=LAYERS, initializer_range=0.05), prompts(1)
    with engine(tmp_path, block_size=32) as llm:
        outputs = generate(llm, asked, LOOPS, max_tokens=1)
        assert distance(model, asked, outputs, LOOPS) <= RIGHT
    print(f"{sum(launches.values())} launches: {dict(launches)}")
    assert sum(launches.values()) <= most


@pytest.mark.usefixtures("triton_attention")
def test_a_looplms_decode_step_launches_ten_kernels_a_layer_and_few_for_its_tables(tmp_path, launches):
    layers = 4
    model, asked = save_looplm(tmp_path, num_hidden_layers=layers), prompts(1)
    counted = []
    with engine(tmp_path, block_size=32) as llm:
        for loops in (1, 2, LOOPS):
            assert distance(model, asked, generate(llm, asked, loops, max_tokens=1), loops) <= RIGHT
            counted.append(sum(launches.values()))
            print(f"{counted[-1]} launches at {loops} loops: {dict(launches)}")
    one, two, most = counted
    loop = 10 * layers + 1  # with the norm that closes it
    assert one == loop + 1, "embeddings; a step of one loop has vLLM's tables"
    assert most - two == 2 * loop and two - 2 * loop - 1 <= 17
