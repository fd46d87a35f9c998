"""What of a student is trained beside its gates: its base, nothing, or low-rank adapters (LoRA, arXiv 2106.09685).

A base that is not trained is the teacher's own: its weights lie in memory once, and have neither gradients nor
optimizer states.
"""

import math

import torch
from torch import Tensor, nn

from melt_serve.modeling import OuroForCausalLM
from melt_serve.train.distil.student import Student

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The projections of an attention that adapters stand beside."""


class AdaptedLinear(nn.Module):
    """W x + B A x: a frozen linear map with a low-rank one beside it, which starts as nothing (B = 0)."""

    def __init__(self, weight: nn.Parameter, rank: int):
        super().__init__()
        self.weight = weight
        self.lora_A = nn.Linear(weight.shape[1], rank, bias=False).to(weight)
        self.lora_B = nn.Linear(rank, weight.shape[0], bias=False).to(weight)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both maps: [..., in] -> [..., out]."""
        return nn.functional.linear(x, self.weight) + self.lora_B(self.lora_A(x))


def is_gate(key: str) -> bool:
    """Tell whether a weight is of a KV gate or of the exit gate, which every student trains as its own."""
    return "_gate." in key


def share_base(student: Student, teacher: OuroForCausalLM, rank: int | None) -> None:
    """Make the student's base the teacher's own weights, which are frozen, with adapters of this rank, if any.

    What later moves the teacher to another device or dtype moves the student's base, too.
    """
    for key, weight in teacher.named_parameters(remove_duplicate=False):
        if not is_gate(key):
            module, _, name = key.rpartition(".")
            setattr(student.get_submodule(module), name, weight.requires_grad_(False))
    if rank is None:
        return
    for layer in student.model.layers:
        for name in ADAPTED:
            setattr(layer.self_attn, name, AdaptedLinear(getattr(layer.self_attn, name).weight, rank))


@torch.no_grad()
def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which W + B A stands for a weight W and its adapters, in the adapters' dtype."""
    whole = {key: value for key, value in state.items() if ".lora_" not in key}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            weight = key.replace(".lora_A", "")
            whole[weight] = state[weight].to(down) + state[key.replace(".lora_A", ".lora_B")] @ down
    return whole
