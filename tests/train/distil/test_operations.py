"""How many operations a micro-batch dispatches: on a GPU each is a kernel to launch, and launching takes the time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from melt_serve.modeling import LoopLMConfig
from melt_serve.train.cost.probe import random_step
from melt_serve.train.recipe_files import load_recipe

CHUNKS, LOOPS, LAYERS = 20, 4, 24
OWN = ["teacher=ouro-1.4b", "data.files=-", "output=-", "dtype=float32", "chunk_size=2"]
WORDS = [*OWN, f"sequence_length={2 * CHUNKS}", f"batch_tokens={2 * CHUNKS}"]


class Operations(TorchDispatchMode):
    """All operations but those that only look at their input another way."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        returns = operation._schema.returns
        self.count += not any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        return operation(*arguments, **(keywords or {}))


@torch.library.custom_op("melt_serve_tests::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@torch.library.custom_op("melt_serve_tests::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.clone(), weight.clone()


rms_norm.register_autograd(
    lambda ctx, gradient: (*rms_norm_backward(gradient, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


@pytest.fixture(autouse=True)
def norms_of_a_gpu(monkeypatch):
    """There a norm is one kernel, and so is its backward pass; on a CPU PyTorch composes both."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: rms_norm(x, weight, eps))


def operations(stage: str, layers: int) -> int:
    """Count those of a micro-batch: forward, and backward with all chunks run again."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    recipe = load_recipe("melt-1.6b", WORDS)
    student, loss = random_step(LoopLMConfig(**sizes, num_hidden_layers=layers), recipe, recipe.stages[stage])
    student.checkpoint_chunks = True
    with Operations() as counted:
        loss().backward()
    return counted.count


@pytest.mark.parametrize(("stage", "most"), [("transition", 430_000), ("alignment", 390_000)])
def test_a_micro_batch_at_the_true_depth_dispatches_few_operations(stage, most):
    """Of 10,000 tokens with C = 512, T = 4 and 24 layers; counted with one layer and two: each has as many."""
    one, two = (operations(stage, layers) for layers in (1, 2))
    assert 0.9 * most < one + (LAYERS - 1) * (two - one) < most
