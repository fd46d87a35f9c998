"""A trained gate cut to a rank: W_z and U_z as products of two thin matrices, for less to compute and to store.

Our addition. What it costs in quality is measured by the study `compressed` of the ablations (docs/studies.md).
"""

import torch
from torch import Tensor

from melt_serve.config import weight_shapes
from melt_serve.modeling import MeltForCausalLM
from melt_serve.train.distil.build import melt_config


@torch.no_grad()
def cut_gate(melt: MeltForCausalLM, rank: int) -> MeltForCausalLM:
    """Return the model with the nearest gate of this rank (`kv_gate_rank`), matrix by matrix.

    Raises:
        StrictDataclassClassValidationError: its gate cannot have this rank; the message says why.
    """
    config = melt_config(melt.config, kv_gate_rank=rank)
    state = melt.state_dict()
    for key, _ in weight_shapes(config):
        if key.endswith("_down.weight"):
            whole = key.replace("_down", "_proj")
            state[whole], state[key] = nearest_factors(state[whole], rank)
    cut = MeltForCausalLM(config).to(melt.dtype)
    cut.load_state_dict(state)
    return cut.eval()


def nearest_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor `weight` into the nearest product in the Frobenius norm: its largest singular values.

    Source: Eckart and Young, 1936.

    Args:
        weight: [out, in].

    Returns:
        [out, rank] and [rank, in], of equal norms.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]
