"""Whatever is named as a checkpoint: it is taken as it is, or every command says in one line what it is instead."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from melt_serve import cli
from melt_serve.checkpoint_check import check_checkpoint
from melt_serve.checkpoint_config import load_config
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.server_process import free_port
from tests import quantized_ouro as quantized
from tests.ouro_files import BASE_TEMPLATE, CONFIG, tokenizer_of, write_ouro

Make = Callable[[Path], object]


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def llama(folder: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **shape)).save_pretrained(folder)


def gguf_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def gguf_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    gguf = folder / "Ouro-1.4B-Q4_K_M.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def adapter(folder: Path) -> None:
    """What peft writes: the adapter, its config, and the base model's tokenizer."""
    shutil.rmtree(folder)
    tokenizer_of(BASE_TEMPLATE).save_pretrained(folder)
    fields = {"base_model_name_or_path": "ByteDance/Ouro-1.4B", "peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": ["q_proj", "v_proj"]}))
    weight = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 64)}
    save_file(weight, folder / "adapter_model.safetensors")


def sharded(folder: Path) -> dict[str, str]:
    """Write the weights as two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + ('layers' in key)}-of-00002.safetensors" for key in tensors}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def half_a_shard(folder: Path) -> None:
    sharded(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def more_tokens_than_rows(folder: Path) -> None:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"].append({"id": 64, "content": "<more>", "special": True})
    path.write_text(json.dumps(fields))


def cast(dtype: torch.dtype) -> Make:
    def make(folder: Path) -> None:
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit(folder / "config.json", torch_dtype=str(dtype).removeprefix("torch."))

    return make


NOT_LOOPED = r"is a 'llama' model"
GGUF = r"is in llama\.cpp's format \(GGUF\), which has no looped models: name the folder of the safetensors"
ADAPTER = r"is an adapter \(PEFT\) of ByteDance/Ouro-1\.4B, not a model: serve that with --enable-lora --lora-modules "
SHARD = r"names the shard model-00002-of-00002\.safetensors, which .* lacks; download the shard again"
TORN = r"model-00001-of-00002\.safetensors is truncated or no safetensors file"
TOKENS = r"the token '<more>' has the id 64, which is outside the vocabulary that config\.json states, 0\.\.63"
BNB = r"is quantized by bitsandbytes, which vLLM does not read: name the unquantized one"

# What `serve`, then `plan`, then all that read weights (`convert`, `eval`, `train run`) say; None where it is taken.
KINDS: dict[str, tuple[Make, str | None, str | None, str | None]] = {
    "as published": (lambda folder: None, None, None, None),
    "shards": (sharded, None, None, None),
    "float16": (cast(torch.float16), None, None, None),
    "bfloat16": (cast(torch.bfloat16), None, None, None),
    "Llama": (llama, None, NOT_LOOPED, NOT_LOOPED),
    "a GGUF file": (gguf_file, GGUF, GGUF, GGUF),
    "a folder of GGUF": (gguf_folder, GGUF, GGUF, GGUF),
    "adapter": (adapter, ADAPTER, ADAPTER, ADAPTER),
    "MLX": (quantized.mlx, r"is quantized by MLX, in a format that only MLX reads: name the un", None, r"zed \(MLX\)"),
    "bitsandbytes": (quantized.bitsandbytes, BNB, None, r"is quantized \(bitsandbytes\), and only a server reads"),
    "GPTQ": (quantized.gptq, None, None, r"is quantized \(gptq\), and only a server reads that; name the unquantized"),
    "AutoGPTQ": (quantized.autogptq, r"quantize_config\.json says how: put its content", None, r"quantized \(gptq\)"),
    "AWQ": (quantized.awq, None, None, r"is quantized \(awq\)"),
    "a shard missing": (without_a_shard, SHARD, None, SHARD),
    "half a shard": (half_a_shard, TORN, None, TORN),
    "too many tokens": (more_tokens_than_rows, TOKENS, None, TOKENS),
}


@pytest.fixture
def checkpoint(request, tmp_path):
    folder = write_ouro(tmp_path / "Ouro-tiny.gguf" if "file" in request.param else tmp_path / "Ouro-tiny", {})
    KINDS[request.param][0](folder)
    return folder, KINDS[request.param][1:]


def refusal(capsys, words: list[str]) -> str | None:
    """Run a command; return the one line that it refuses its checkpoint with, or None."""
    if (code := cli.main(words)) == 0:
        return None
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and len(said) == 1 and "error: " in said[0], said
    return said[0]


def judge(says: str | None, message: str | None) -> None:
    assert (says is None) == (message is None), says
    if says is not None:
        assert re.search(message, says), says


@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
def test_each_command_takes_a_checkpoint_or_says_in_one_line_what_it_is(checkpoint, tmp_path, capsys):
    folder, (serve, plan, weights) = checkpoint
    try:
        says = None
        check_checkpoint(folder, whole=False)
    except CheckpointError as error:
        says = str(error)
    judge(says, serve)
    judge(refusal(capsys, ["plan", str(folder)]), plan)
    judge(refusal(capsys, ["convert", str(folder), str(tmp_path / "melt"), "--quiet"]), weights)
    judge(refusal(capsys, ["eval", str(folder), "--questions", "1", "--loops", "1"]), weights)
    if weights is not None:  # what is taken is trained on in tests/train
        run = ["train", "run", "melt-1.6b", f"teacher={folder}", "data.files=-", f"output={tmp_path / 'out'}"]
        judge(refusal(capsys, [*run, "--run", str(tmp_path / "run")]), weights)


@pytest.mark.parametrize("checkpoint", ["adapter", "a GGUF file", "MLX"], indirect=True)
def test_a_server_is_not_started_on_what_is_none(checkpoint, capsys):
    folder, (serve, *_) = checkpoint
    judge(refusal(capsys, ["serve", str(folder), "--port", str(free_port())]), serve)


def test_a_rope_that_no_field_states_is_told(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in CONFIG.items() if not key.startswith("rope")}))
    assert load_config(tmp_path).rope_base == 1e6
    assert capsys.readouterr().err.startswith(f"warning: {path} states no rope_theta: 1e+06 is taken")
    for stated in ({"rope_theta": 7.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}):
        edit(path, **{"rope_theta": None, **stated})
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if v is not None}))
        assert load_config(tmp_path).rope_base == 7
        assert not capsys.readouterr().err
