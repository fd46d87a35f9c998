"""A folder that cannot be served as it is is refused in one sentence that names file, field and remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from melt_serve import cli
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.checkpoint_check import check_checkpoint
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.checksums import SUMS, ChecksumError, verify_sums, write_sums
from tests.tiny_models import tiny_looplm, tiny_melt

Spoil = Callable[[Path], object]
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the bundled MELT, with checksums."""
    folder = tmp_path / "melt"
    shutil.copytree(MELT, folder)
    write_sums(folder)
    return folder


def state(**fields: object) -> Spoil:
    """State other fields in config.json."""
    return lambda folder: edit(folder / "config.json", **fields)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def without(part: str) -> Spoil:
    return tensors(lambda weights: [weights.pop(name) for name in list(weights) if part in name])


def cast(dtype: torch.dtype) -> Spoil:
    return tensors(lambda weights: weights.update({NORM: weights[NORM].to(dtype)}))


def template(text: str) -> Spoil:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def file(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def weights_of(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def flip_bit(content: bytes) -> bytes:
    spoilt = bytearray(content)
    spoilt[-1000] ^= 1
    return bytes(spoilt)


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"].append({"id": 512, "content": "<far>"})
    path.write_text(json.dumps(fields))


HEADERS: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json; name the folder"),
    "half a config": (file("config.json", '{"model_type": "melt",'), r"config\.json is not valid JSON"),
    "nested too deep": (file("config.json", "[" * 100_000), r"config\.json is not valid JSON"),
    "a list": (file("config.json", "[]"), r"config\.json holds no JSON object"),
    "another architecture": (state(architectures=["LlamaForCausalLM"]), r"architectures=\['LlamaForCausalLM'\], but"),
    "words for a number": (state(hidden_size="wide"), r"config\.json cannot be used: .*hidden_size"),
    "no heads": (state(num_attention_heads=0), r"num_attention_heads must be at least 1, not 0"),
    "rope of a list": (state(rope_parameters=[1]), r"config\.json cannot be used: "),
    "eps NaN": (state(rms_norm_eps=float("nan")), r"rms_norm_eps must be above 0 and below 1, not nan"),
    "eps below 0": (state(rms_norm_eps=-1.0), r"rms_norm_eps must be above 0 and below 1, not -1\.0"),
    "theta inf": (
        state(rope_parameters={"rope_type": "default", "rope_theta": float("inf")}),
        r"rope_theta must be a positive number, not inf",
    ),
    "eos beyond": (state(eos_token_id=512), r"eos_token_id=512 is outside the vocabulary, 0\.\.511"),
    "one eos beyond": (state(eos_token_id=[2, 9999]), r"eos_token_id=\[2, 9999\] is outside"),
    "chunks too large": (state(chunk_size=10**9), r"chunk_size must be at most 262144, not 1000000000"),
    "loops too many": (state(max_loops=10**9, decode_mode="chunk"), r"max_loops must be at most 1024, not 1000000000"),
    "layers too many": (state(num_hidden_layers=10**5), r"num_hidden_layers must be at most 1024, not 100000"),
    "context too long": (state(max_position_embeddings=10**12), r"max_position_embeddings must be at most 16777216"),
    "a layer too many": (state(num_hidden_layers=2), r"lacks the tensor model\.layers\.1\.self_attn\.q_proj\.weight"),
    "a wider MLP": (state(intermediate_size=577), r"mlp\.\S+ in .* has shape \[.*576.*\], config\.json implies"),
    "a gate of rank": (
        state(kv_gate_rank=4),
        r"kv_gate\S+ in .* has shape \[192, 192\], config\.json implies",
    ),
    "no gate": (without("kv_gate"), r"lacks the tensor model\.layers\.0\.self_attn\.kv_gate\.input_proj\.weight and 2"),
    "no norm": (without("model.norm"), r"lacks the tensor model\.norm\.weight; download"),
    "no head": (without("lm_head"), r"lacks the tensor lm_head\.weight; download"),
    "int8": (cast(torch.int8), r"has dtype I8; use the unquantised"),
    "float64": (cast(torch.float64), r"has dtype F64; use the unquantised"),
    "left over": (tensors(lambda weights: weights.update(extra=torch.ones(1))), r"the unexpected tensor extra"),
    "truncated": (weights_of(lambda content: content[:-100]), r"model\.safetensors is truncated or no safetensors"),
    "empty": (weights_of(lambda content: b""), r"model\.safetensors is truncated or no safetensors"),
    "random": (weights_of(lambda content: bytes(range(256)) * 40), r"truncated or no safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has neither model\.safetensors nor"),
    "a shard missing": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            file("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}')(folder),
        ),
        r"names the shard model-1\.safetensors, which .* lacks",
    ),
    "one bit": (weights_of(flip_bit), r"model\.safetensors is not as it was written: it is damaged, or was changed"),
    "damaged sums": (file(SUMS, "0123"), r"SHA256SUMS is damaged at '0123'"),
    "no tokenizer JSON": (file("tokenizer.json", "{"), r"tokenizer\.json is not valid JSON"),
    "a token beyond": (
        add_token,
        r"tokenizer\.json: the token '<far>' has the id 512, which is outside the vocabulary",
    ),
    "generation's eos": (file("generation_config.json", '{"eos_token_id": [2, 512]}'), r"eos_token_id has the id 512"),
    "endless template": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        r"takes the chat template more than 2 s; correct the chat template in .*chat_template\.jinja",
    ),
    "huge template": (template("{{ 'x' * 10 ** 10 }}"), r"makes more than 1,048,576 characters .* or takes more than"),
    "growing template": (
        template("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}{{ n.x }}"),
        r"makes more than 1,048,576 characters .* or takes more than 512 MiB",
    ),
    "broken template": (template("{% if %}"), r"the chat template is not valid Jinja; correct"),
}
VALUES: dict[str, tuple[Spoil, str]] = {
    "norm NaN": (tensors(lambda weights: weights[NORM].__setitem__(3, float("nan"))), rf"{NORM} .* NaN or infinite"),
    "gate Inf": (
        tensors(lambda weights: weights["model.layers.0.self_attn.kv_gate.input_proj.bias"].fill_(float("inf"))),
        r"input_proj\.bias .* NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_cannot_be_served_is_refused_before_a_value_is_read(name, checkpoint):
    spoil, message = HEADERS[name]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as refusal:
        check_checkpoint(checkpoint, whole=False)
    assert str(checkpoint) in str(refusal.value)


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_no_numbers_are_refused(name, checkpoint):
    spoil, message = VALUES[name]
    spoil(checkpoint)
    (checkpoint / SUMS).unlink()
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("folder", [MELT, LOOPLM], ids=["MELT", "LoopLM"])
def test_what_is_bundled_is_whole(folder):
    checked = check_checkpoint(folder)
    assert checked is not None and checked.nbytes == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("make", [tiny_melt, tiny_looplm])
def test_tied_weights_and_tensors_that_nobody_reads_are_no_fault(make, tmp_path):
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path) is not None
    spare = {"lm_head.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    tensors(lambda weights: weights.update(spare))(tmp_path)
    assert check_checkpoint(tmp_path) is not None


def test_a_quantized_checkpoint_has_some_tensor_for_every_layer(checkpoint):
    (checkpoint / SUMS).unlink()
    state(quantization_config={"quant_method": "compressed-tensors"})(checkpoint)
    projection = "model.layers.0.self_attn.q_proj.weight"
    tensors(lambda weights: weights.update({f"{projection}_packed": weights.pop(projection).to(torch.int32)}))(
        checkpoint
    )
    assert check_checkpoint(checkpoint) is not None
    without("q_proj")(checkpoint)
    with pytest.raises(CheckpointError, match=f"lacks the tensor {projection}; download"):
        check_checkpoint(checkpoint)


def test_other_models_are_left_to_vllm(checkpoint):
    state(model_type="llama")(checkpoint)
    assert check_checkpoint(checkpoint) is None


@pytest.mark.parametrize("text", ["{{ raise_exception('two words') }}", "{% generation %}{% endgeneration %}", ""])
def test_a_template_that_does_not_take_the_chat_is_no_fault(text, checkpoint):
    (checkpoint / SUMS).unlink()
    template(text)(checkpoint)
    assert check_checkpoint(checkpoint) is not None


def test_another_template_takes_the_place_of_a_bad_one(checkpoint, tmp_path):
    (checkpoint / SUMS).unlink()
    template("{% if %}")(checkpoint)
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text("{{ messages }}")
    bad.write_text("{% for %}")
    for instead in (good, Path("{{ messages }}" * 999)):  # vLLM takes the text itself, too
        assert check_checkpoint(checkpoint, chat_template=instead) is not None
    with pytest.raises(CheckpointError, match=r"not valid Jinja; correct the chat template in .*bad\.jinja"):
        check_checkpoint(checkpoint, chat_template=bad)


def test_a_changed_config_is_served_but_not_whole(checkpoint):
    """Whoever edits a config means to; whoever asks for a check wants to know."""
    state(effort_loops={"low": 1})(checkpoint)
    assert check_checkpoint(checkpoint, whole=False) is not None
    with pytest.raises(CheckpointError, match=r"config\.json is not as it was written"):
        check_checkpoint(checkpoint)


def test_checksums_miss_no_file_and_no_bit(tmp_path):
    (tmp_path / "inside").mkdir()
    for name in ("a", "inside/b", "README.md"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    assert verify_sums(tmp_path) == 2
    (tmp_path / "README.md").write_text("edited")
    assert verify_sums(tmp_path) == 2
    (tmp_path / "inside" / "b").write_text("inside/c")
    with pytest.raises(ChecksumError, match="inside/b is not as it was written"):
        verify_sums(tmp_path)
    (tmp_path / "inside" / "b").unlink()
    with pytest.raises(ChecksumError, match="inside/b is missing"):
        verify_sums(tmp_path)
    (tmp_path / SUMS).write_text("0" * 64 + "  ../../outside\n")
    with pytest.raises(ChecksumError, match="is damaged"):
        verify_sums(tmp_path)


def test_the_command_says_what_it_found_in_one_line(checkpoint, capsys):
    assert cli.main(["convert", "--check", str(checkpoint), "--quiet"]) == 0
    assert "is whole: melt, 19 tensors, 0.003 GB; 6 checksums match" in capsys.readouterr().out
    weights_of(flip_bit)(checkpoint)
    assert cli.main(["convert", "--check", str(checkpoint), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("melt-serve: error: ") and "not as it was written" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"), [(["--check", "{}", "./new"], "leave out new"), (["{}"], "convert needs DST")]
)
def test_check_writes_nothing_and_convert_writes_somewhere(words, says, checkpoint, capsys):
    assert cli.main(["convert", *(word.format(checkpoint) for word in words)]) == 2
    assert says in capsys.readouterr().err
