"""Four-bit weights in compressed-tensors' format, through vLLM's own kernels: the engine equals the reference with
the weights those four bits stand for."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.engines import (
    engine,
    engine_logprobs,
    generate,
    prompts,
    reference_logprobs,
    save_looplm,
    save_melt,
)
from tests.requires import needs_four_bits

GROUP = 32


def quantize(path, model, ignore):
    """Rewrite the checkpoint at `path` with linear layers in 4 bits, symmetric, a scale for every 32 inputs.

    The model gets the very weights that the checkpoint now stands for.
    """
    tensors = load_file(path / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith(ignore):
            continue
        weight = tensors.pop(f"{name}.weight")
        grouped = weight.view(weight.shape[0], -1, GROUP)
        scale = (grouped.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        levels = (grouped / scale).round().clamp(-8, 7)
        module.weight.data = (levels * scale).view_as(weight)
        nibbles = (levels.view(weight.shape[0], -1, 8) + 8).to(torch.int64) << torch.arange(0, 32, 4)
        tensors[f"{name}.weight_packed"] = nibbles.sum(-1).to(torch.uint32).view(torch.int32)
        tensors[f"{name}.weight_scale"] = scale.squeeze(-1).contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [f"re:.*{name}$" for name in ignore],
    }
    (path / "config.json").write_text(json.dumps(config))


@needs_four_bits
@pytest.mark.parametrize("save", [save_melt, save_looplm])
@pytest.mark.parametrize("ignore", [(), ("input_proj", "state_proj")], ids=["all", "not-the-gate"])
def test_four_bits_equal_the_weights_they_stand_for(tmp_path, save, ignore):
    """vLLM's kernel has bfloat16 only: the engine is as near to float32 as the reference in bfloat16 is."""
    model = save(tmp_path, initializer_range=0.07)
    before = copy.deepcopy(model)
    quantize(tmp_path, model, (*ignore, "early_exit_gate", "lm_head"))
    rounded, asked = copy.deepcopy(model).bfloat16(), prompts(1, 33, 70, 100, 90, 80, 60, 50)
    with engine(tmp_path, dtype="bfloat16") as llm:
        outputs = generate(llm, asked)

    def mean_distance(measured, expected):
        return (measured - expected).abs().mean()

    answers = [output.token_ids for output in outputs]
    exact, in_bfloat16, without = (
        torch.cat(reference_logprobs(each, asked, answers)) for each in (model, rounded, before)
    )
    served = torch.cat([engine_logprobs(output) for output in outputs])
    assert mean_distance(served, exact) <= 1.5 * mean_distance(in_bfloat16, exact)
    assert mean_distance(without, exact) > 4 * mean_distance(served, exact), "four bits would not show"
