"""Random LoRA adapters in PEFT's format, and the reference models with them merged in."""

import copy
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput

from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from tests.engine.engines import ADAPTERS, distance, generate, prompts

EVERY_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
THE_GATE = ("kv_gate.input_proj", "kv_gate.state_proj")
RANK = ADAPTERS["max_lora_rank"]

numbers = count(1)  # an engine keeps an adapter by its number, and a live one must not meet a number twice


class Adapter(NamedTuple):
    """An adapter as vLLM takes it, and the model with it merged in."""

    request: LoRARequest
    merged: MeltForCausalLM | OuroForCausalLM


def save_adapter(
    folder: Path, model: MeltForCausalLM | OuroForCausalLM, targets: tuple[str, ...], seed: int = 0
) -> Adapter:
    """Save a random adapter of the targets' layers in a folder of its own."""
    number = next(numbers)
    path = folder / f"adapter-{number}"
    generator, merged, tensors = torch.Generator().manual_seed(seed), copy.deepcopy(model), {}
    for name, weight in merged.named_parameters():
        module = name.removesuffix(".weight")
        if module.endswith(targets) and name.endswith(".weight"):
            a = 0.2 * torch.randn(RANK, weight.shape[1], generator=generator)
            b = 0.2 * torch.randn(weight.shape[0], RANK, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            weight.data += 0.5 * b @ a
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in targets})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK // 2, "target_modules": names, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(LoRARequest(path.name, number, str(path)), merged)


def answer_with(
    llm: LLM, asked: list[list[int]], adapters: Sequence[Adapter | None], **depths: Sequence[float]
) -> list[CompletionOutput]:
    """Answer each prompt with its adapter, or with none, in one batch."""
    return generate(llm, asked, adapters=[adapter and adapter.request for adapter in adapters], **depths)


def distance_with(
    adapters: Sequence[Adapter | None],
    model: MeltForCausalLM | OuroForCausalLM,
    asked: list[list[int]],
    outputs: list[CompletionOutput],
    loops: Sequence[int | None] | None = None,
    exits: Sequence[float | None] | None = None,
) -> float:
    """Return the largest difference from the reference with each prompt's adapter merged in."""
    each = zip(adapters, asked, outputs, loops or [None] * len(asked), exits or [None] * len(asked), strict=True)
    return max(
        distance(adapter.merged if adapter else model, [prompt], [output], *depth)
        for adapter, prompt, output, *depth in each
    )


def distance_with_two(
    llm: LLM, model: MeltForCausalLM | OuroForCausalLM, folder: Path, targets: tuple[str, ...]
) -> float:
    """Mix two adapters and none in a batch, twice so that the second time prefixes are found."""
    first, second = (save_adapter(folder, model, targets, seed) for seed in range(2))
    asked, furthest = prompts(5, 70, 33), 0.0
    for prompt in asked:
        prompt[:30] = asked[1][:30]
    for _ in range(2):
        for adapters in (first, None, second), (None, second, first):
            outputs = answer_with(llm, asked, adapters)
            furthest = max(furthest, distance_with(adapters, model, asked, outputs))
    return furthest
