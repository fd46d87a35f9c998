"""The checkpoint of `ouro_files.py` as other tools would write it, with their names, dtypes and fields.

Its linear layers are nothing but zeros, which every format holds exactly: where one is served, its answers are known.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
Written = dict[str, Tensor]


def rewrite(folder: Path, linear: Callable[[Tensor], Written], fields: dict[str, object], made_by: str = "pt") -> Path:
    """Replace the layers' projections by what `linear` makes of each, by suffix, and state `fields` in the config."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        assert not weight.any()
        tensors |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in linear(weight).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": made_by})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def packed(rows: int, columns: int, nibble: int) -> Tensor:
    """Eight times the same four bits in each int32."""
    return torch.full((rows, columns), nibble * 0x11111111, dtype=torch.int64).to(torch.int32)


def gptq(folder: Path) -> Path:
    """GPTQModel's, whose zero point is stored less one."""

    def linear(weight: Tensor) -> Written:
        out, width = weight.shape
        return {
            "qweight": packed(width // 8, out, 8),
            "qzeros": packed(width // GROUP, out // 8, 7),
            "scales": torch.ones(width // GROUP, out, dtype=torch.float16),
            "g_idx": torch.arange(width, dtype=torch.int32) // GROUP,
        }

    fields = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
    return rewrite(folder, linear, {"quantization_config": {**fields, "quant_method": "gptq"}})


def autogptq(folder: Path) -> Path:
    """An older tool's: its settings lie in a file of their own."""
    gptq(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def awq(folder: Path) -> Path:
    """AutoAWQ's."""

    def linear(weight: Tensor) -> Written:
        out, width = weight.shape
        return {
            "qweight": packed(width, out // 8, 8),
            "qzeros": packed(width // GROUP, out // 8, 8),
            "scales": torch.ones(width // GROUP, out, dtype=torch.float16),
        }

    fields = {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True, "quant_method": "awq"}
    return rewrite(folder, linear, {"quantization_config": fields})


def bitsandbytes(folder: Path) -> Path:
    """Four bits of transformers with bitsandbytes; seven is the code of 0."""

    def linear(weight: Tensor) -> Written:
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)})
        return {
            "weight": torch.full((weight.numel() // 2, 1), 0x77, dtype=torch.uint8),
            "weight.absmax": torch.ones(weight.numel() // 64),
            "weight.quant_map": torch.linspace(-1, 1, 16),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
        }

    fields = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "_load_in_4bit": True}
    return rewrite(folder, linear, {"quantization_config": fields})


def mlx(folder: Path) -> Path:
    """Four bits of mlx-lm, which names no method."""

    def linear(weight: Tensor) -> Written:
        out, width = weight.shape
        scales = torch.ones(out, width // GROUP, dtype=torch.bfloat16)
        return {"weight": packed(out, width // 8, 8).view(torch.uint32), "scales": scales, "biases": -8 * scales}

    settings = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    return rewrite(folder, linear, {"quantization": settings, "quantization_config": settings}, made_by="mlx")
