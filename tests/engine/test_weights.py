"""A checkpoint that lacks tensors, or holds values that are none, is never served with whatever memory held."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.distributed import cleanup_dist_env_and_memory

from melt_serve.config import LoopLMConfig, MeltConfig, weight_shapes
from melt_serve.engine.weights import WeightChecks
from tests.engine.engines import SHAPE, engine, generate, prompts, save_looplm, save_melt
from tests.engine.test_quantization import quantize
from tests.requires import needs_four_bits

GATE = "model.layers.1.self_attn.kv_gate.state_proj.weight"
LAST_V = "model.layers.1.self_attn.v_proj.weight"
Tensors = dict[str, torch.Tensor]


def refuse(path, message, **arguments):
    """See that plain vLLM refuses to start."""
    try:
        with pytest.raises(ValueError, match=message), engine(path, **arguments):
            pass
    finally:
        cleanup_dist_env_and_memory()


def change_file(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def without_gate(tensors):
    for name in [name for name in tensors if "kv_gate" in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("save", "overrides", "change", "message"),
    [
        (save_melt, {}, without_gate, r"lacks the tensor model\.layers\.0\.self_attn\.kv_gate\S+ and 5 more; download"),
        (
            save_looplm,
            {},
            drop("model.layers.1.self_attn.v_proj.weight"),
            r"lacks the tensor model\.layers\.1\.\S+v_pr",
        ),
        (
            save_melt,
            {"tie_word_embeddings": True},
            lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")),
            r"model\.norm\.weight holds NaN or infinite",
        ),
    ],
    ids=["no gate", "LoopLM", "tied, NaN"],
)
def test_plain_vllm_does_not_serve_a_checkpoint_that_is_not_whole(tmp_path, save, overrides, change, message):
    save(tmp_path, **overrides)
    change_file(tmp_path, change)
    refuse(tmp_path, message)


@needs_four_bits
def test_a_quantized_checkpoint_without_a_scale_is_refused(tmp_path):
    quantize(tmp_path, save_melt(tmp_path, initializer_range=0.07), ("early_exit_gate", "lm_head"))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path, whole)
    change_file(tmp_path, drop(GATE.replace("weight", "weight_scale")))
    refuse(tmp_path, "not initialized from.*state_proj", dtype="bfloat16")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    change_file(tmp_path, drop(*(GATE.replace("weight", f"weight_{part}") for part in ("packed", "scale", "shape"))))
    refuse(tmp_path, r"lacks the tensor model\.layers\.1\.self_attn\.kv_gate\.state_proj\.weight;", dtype="bfloat16")


def test_a_live_engine_takes_parts_of_new_weights(tmp_path):
    """As a trainer sends them: one tensor at a time, to an engine that may have begun with none."""
    model = save_melt(tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    with engine(tmp_path, load_format="dummy") as llm:
        part = {"model.norm.weight": model.state_dict()["model.norm.weight"] * 0}
        llm.apply_model(lambda served: served.load_weights(part.items()))
        (answer,) = generate(llm, prompts(5), max_tokens=3)
        logprobs = [each.logprob for candidates in answer.logprobs for each in candidates.values()]
        assert max(logprobs) - min(logprobs) < 1e-4, "a norm of zeros gives every token the same score"


def whole_weights(config) -> Tensors:
    return {name: torch.ones(shape) for name, shape in weight_shapes(config)}


@pytest.mark.parametrize(
    "config",
    [
        MeltConfig(**SHAPE),
        MeltConfig(**SHAPE, kv_gate_rank=3),
        MeltConfig(**SHAPE, tie_word_embeddings=True, kv_gate_type="last"),
        LoopLMConfig(**SHAPE),
    ],
    ids=["MELT", "rank", "tied", "LoopLM"],
)
def test_every_tensor_is_missed_and_every_value_is_looked_at(config):
    weights = whole_weights(config)
    checks = WeightChecks(config, quantized=False)
    assert dict(checks.watch(weights.items())) == weights
    checks.refuse_missing()
    for name in weights:
        checks = WeightChecks(config, quantized=False)
        list(checks.watch((key, weight) for key, weight in weights.items() if key != name))
        with pytest.raises(ValueError, match=f"lacks the tensor {name}; download"):
            checks.refuse_missing()
        for value in (float("nan"), float("inf"), float("-inf")):
            spoilt = weights[name].to(torch.bfloat16)
            spoilt.view(-1)[-1] = value
            with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
                list(checks.watch([(name, spoilt)]))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(63), r"shape \[63\], config\.json implies \[64\]"),
        (torch.ones(64, dtype=torch.float64), "dtype torch.float64"),
        (torch.ones(64, dtype=torch.int8), "dtype torch.int8"),
    ],
)
def test_another_shape_or_dtype_is_refused_by_name(weight, message):
    checks = WeightChecks(MeltConfig(**SHAPE), quantized=False)
    with pytest.raises(ValueError, match=f"model.norm.weight has {message}"):
        list(checks.watch([("model.norm.weight", weight)]))
