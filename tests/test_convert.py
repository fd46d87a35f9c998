"""A converted checkpoint is the source plus a fresh gate; a broken source leaves nothing behind."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from melt_serve import cli
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.config import LoopLMConfig, weight_shapes
from melt_serve.convert import ConversionError, convert
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from tests.ouro_files import BASE_TEMPLATE, tokenizer_of, write_ouro
from tests.signals import hear_ctrl_c
from tests.tiny_models import tiny_looplm, tokens

OURO_FIELDS = {
    "architectures": ["OuroForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig"},
    "layer_types": ["full_attention", "full_attention"],
    "max_window_layers": 2,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
}
OTHER_FILES = {
    "LICENSE": "Apache",
    "README.md": "---\ntags: [a]\nlicense: apache-2.0\n---\nOuro's own card",
    "modeling_ouro.py": "raise SystemExit",
}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_ouro(folder: Path, max_shard_size: str = "50GB", dtype: torch.dtype = torch.float32) -> Path:
    """Write a source as it is published: an Ouro-style config, tokenizer files, remote code, a licence."""
    model = tiny_looplm(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, **OURO_FIELDS}))
    tokenizer_of(BASE_TEMPLATE).save_pretrained(folder)
    for name, content in OTHER_FILES.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return save_ouro(tmp_path_factory.mktemp("single") / "ouro")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_ouro(tmp_path_factory.mktemp("sharded") / "ouro", max_shard_size="100KB")


def load(folder: Path) -> MeltForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("kind", ["single", "sharded"])
@torch.no_grad()
def test_gate_type_last_in_one_chunk_answers_as_the_source(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    convert(source, tmp_path / "melt", gate_type="last", show_progress=False)
    prompt = tokens(2, 20)
    expected = OuroForCausalLM.from_pretrained(source)(prompt, output_loops=True)
    answer = load(tmp_path / "melt")(prompt, output_loops=True)
    torch.testing.assert_close(answer.loop_logits, expected.loop_logits, atol=1e-5, rtol=0)


def test_weights_are_the_sources_bit_for_bit_and_the_gate_starts_as_the_reference(sharded, tmp_path):
    convert(sharded, tmp_path / "melt", show_progress=False)
    source = OuroForCausalLM.from_pretrained(sharded).state_dict()
    melt = load(tmp_path / "melt").state_dict()
    assert all(torch.equal(melt[key], weight) for key, weight in source.items())
    gate = {key: weight for key, weight in melt.items() if key not in source}
    assert len(gate) == 3 * 2
    for key, weight in gate.items():
        if key.endswith("bias"):
            assert torch.all(weight == -2)
        else:
            assert weight.std().item() == pytest.approx(0.02 * math.sqrt(192 / 64), rel=0.1)
            assert weight.mean().item() == pytest.approx(0, abs=0.002)


def test_the_gate_depends_on_the_seed_and_not_on_the_sharding(single, sharded, tmp_path):
    def gate(source: Path, seed: int) -> torch.Tensor:
        target = tmp_path / f"{source.parent.name}-{seed}"
        convert(source, target, seed=seed, show_progress=False)
        return load(target).model.layers[1].self_attn.kv_gate.state_proj.weight

    assert torch.equal(gate(single, seed=3), gate(sharded, seed=3))
    assert not torch.equal(gate(single, seed=4), gate(single, seed=5))


def test_answers_end_with_the_marks_of_the_tokenizer_and_of_the_chat_template(tmp_path):
    convert(write_ouro(tmp_path / "ouro", {}), tmp_path / "melt", show_progress=False)
    assert json.loads((tmp_path / "melt" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert "auto_map" not in json.loads((tmp_path / "melt" / "config.json").read_text())


def test_marks_that_config_json_states_stay(tmp_path):
    source = write_ouro(tmp_path / "ouro", {})
    edit_json(source / "config.json", eos_token_id=[7, 9])
    convert(source, tmp_path / "melt", show_progress=False)
    assert json.loads((tmp_path / "melt" / "generation_config.json").read_text())["eos_token_id"] == [7, 9, 0, 2]


def test_a_tokenizer_that_cannot_be_read_is_told_and_carried_over(tmp_path, capsys):
    source = write_ouro(tmp_path / "ouro", {})
    (source / "tokenizer.json").write_text('{"model": {"type": "of tomorrow"}}')
    convert(source, tmp_path / "melt", show_progress=False)
    assert "cannot be read, so its end marks" in capsys.readouterr().err
    assert (tmp_path / "melt" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def test_a_source_without_a_tokenizer_is_told(tmp_path, capsys):
    source = write_ouro(tmp_path / "ouro", {})
    for path in source.glob("tokenizer*"):
        path.unlink()
    convert(source, tmp_path / "melt", show_progress=False)
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("gate_type", ["elementwise", "scalar", "mean", "ema", "last"])
def test_every_gate_type_loads_whole(gate_type, single, tmp_path):
    convert(single, tmp_path / "melt", gate_type=gate_type, initial_state="zeros", show_progress=False)
    config = load(tmp_path / "melt").config
    assert (config.kv_gate_type, config.kv_gate_initial_state) == (gate_type, "zeros")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_takes_the_sources_dtype(dtype, tmp_path):
    convert(save_ouro(tmp_path / "ouro", dtype=dtype), tmp_path / "melt", show_progress=False)
    for path in (tmp_path / "melt").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}


def test_config_keeps_ouros_fields_and_names_melt(single, tmp_path):
    convert(single, tmp_path / "melt", chunk_size=64, decode_mode="chunk", max_loops=8, show_progress=False)
    source = json.loads((single / "config.json").read_text())
    config = json.loads((tmp_path / "melt" / "config.json").read_text())
    del source["auto_map"]
    assert config == {
        **source,
        "model_type": "melt",
        "architectures": ["MeltForCausalLM"],
        "kv_gate_type": "elementwise",
        "kv_gate_initial_state": "input",
        "chunk_size": 64,
        "decode_mode": "chunk",
        "max_loops": 8,
        "effort_loops": {"high": 4, "xhigh": 4, "max": 4},  # how it answers beyond its own loops is not known
    }
    assert load(tmp_path / "melt").config.rope_base == 10000.0


def test_files_of_the_source_are_carried_over_but_neither_its_code_nor_its_card(single, tmp_path):
    convert(single, tmp_path / "melt", seed=7, show_progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "melt" / name).read_bytes() == (single / name).read_bytes()
    assert not list((tmp_path / "melt").glob("*.py"))
    card = (tmp_path / "melt" / "README.md").read_text()
    assert "license: apache-2.0\n" in card and "elementwise" in card and "seed 7" in card
    assert "own card" not in card


def test_an_empty_target_and_new_parents_are_filled(single, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(single, tmp_path / "empty", show_progress=False)
    convert(single, tmp_path / "a" / "b", show_progress=False)
    assert load(tmp_path / "empty") and load(tmp_path / "a" / "b")


@pytest.mark.parametrize(("chunk_size", "better"), [(500, 512), (20, 32), (8, 16), (512, None), (48, None)])
def test_a_chunk_size_that_blocks_do_not_divide_is_warned_about(chunk_size, better, single, tmp_path, capsys):
    convert(single, tmp_path / "melt", chunk_size=chunk_size, show_progress=False)
    warning = capsys.readouterr().err
    assert (f"a chunk size of {better} avoids that" in warning) if better else not warning


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def poison(value: float) -> Callable[[Path], None]:
    def spoil(source: Path) -> None:
        change_tensors(source / "model.safetensors", lambda tensors: tensors["model.norm.weight"].__setitem__(3, value))

    return spoil


def pickle_only(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def no_room(source: Path) -> None:
    """Make a checkpoint as large as the disk's free space: a hole in a file takes none of it."""
    path = source / "model.safetensors"
    vocabulary = shutil.disk_usage(source).free // (64 * 4) + 1
    edit_json(source / "config.json", vocab_size=vocabulary, tie_word_embeddings=True)
    offset, header = 0, {}
    for key, shape in weight_shapes(LoopLMConfig(**json.loads((source / "config.json").read_text()))):
        end = offset + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"ouro does not exist"),
    "a file": (lambda s: (shutil.rmtree(s), s.write_text("")), r"is not a folder"),
    "no config": (lambda s: (s / "config.json").unlink(), r"has no config\.json"),
    "invalid JSON": (lambda s: (s / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "a JSON list": (lambda s: (s / "config.json").write_text("[]"), r"config\.json holds no JSON object"),
    "another model": (
        lambda s: edit_json(s / "config.json", model_type="llama"),
        r"is a 'llama' model; a MELT",
    ),
    "no model type": (lambda s: (s / "config.json").write_text("{}"), r"is a None model; a MELT is made from"),
    "MELT already": (lambda s: edit_json(s / "config.json", model_type="melt"), r"is a MELT checkpoint already"),
    "unsupported config": (lambda s: edit_json(s / "config.json", hidden_act="gelu"), r"must be 'silu'"),
    "a missing tensor": (
        lambda s: change_tensors(s / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight")),
        r"lacks the tensor model\.norm\.weight; download",
    ),
    "missing layers": (
        lambda s: edit_json(s / "config.json", num_hidden_layers=3, layer_types=None),
        r"layers\.2\..* and 10 more",
    ),
    "an unexpected tensor": (
        lambda s: change_tensors(s / "model.safetensors", lambda tensors: tensors.update(extra=torch.ones(1))),
        r"unexpected tensor extra",
    ),
    "a wrong shape": (
        lambda s: edit_json(s / "config.json", intermediate_size=95),
        r"has shape \[(96, 64|64, 96)\], config\.json implies \[(95, 64|64, 95)\]",
    ),
    "quantised": (
        lambda s: change_tensors(
            s / "model.safetensors",
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        ),
        r"dtype I8; use the unquantised",
    ),
    "NaN": (poison(float("nan")), r"model\.norm\.weight .* NaN or infinite"),
    "infinity": (poison(float("-inf")), r"model\.norm\.weight .* NaN or infinite"),
    "truncated": (
        lambda s: (s / "model.safetensors").write_bytes((s / "model.safetensors").read_bytes()[:-100]),
        r"model\.safetensors is truncated",
    ),
    "an empty file": (lambda s: (s / "model.safetensors").write_bytes(b""), r"model\.safetensors is truncated"),
    "no safetensors": (lambda s: (s / "model.safetensors").write_bytes(b"x" * 99), r"or no safetensors file"),
    "pickle only": (pickle_only, r"pickled weights only"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), r"has neither model\.safetensors nor"),
    "no room on the disk": (no_room, r"needs .* GB and its disk has .* GB free"),
}
SHARDED_REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (
        lambda s: (s / "model-00002-of-00004.safetensors").unlink(),
        r"names the shard model-00002-of-00004\.safetensors, which .* lacks",
    ),
    "a truncated shard": (
        lambda s: (s / "model-00003-of-00004.safetensors").write_bytes(b""),
        r"model-00003-of-00004\.safetensors is truncated",
    ),
    "a shard elsewhere": (
        lambda s: edit_json(s / "model.safetensors.index.json", weight_map={"a": "../ouro/config.json"}),
        r"names the shard \.\./ouro/config\.json",
    ),
    "an invalid index": (lambda s: (s / "model.safetensors.index.json").write_text("?"), r"index\.json is not valid"),
    "an empty index": (lambda s: (s / "model.safetensors.index.json").write_text("{}"), r"has no weight_map"),
    "a tensor twice": (
        lambda s: change_tensors(
            s / "model-00001-of-00004.safetensors",
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}),
        ),
        r"both hold model\.norm\.weight",
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("single", name) for name in REFUSALS), *(("sharded", name) for name in SHARDED_REFUSALS)],
)
def test_a_bad_source_is_refused_in_one_sentence_and_leaves_nothing_behind(kind, name, request, tmp_path):
    spoil, message = {**REFUSALS, **SHARDED_REFUSALS}[name]
    source = tmp_path / "ouro"
    shutil.copytree(request.getfixturevalue(kind), source)
    spoil(source)
    with pytest.raises(CheckpointError, match=message) as refusal:
        convert(source, tmp_path / "new" / "melt", show_progress=False)
    assert "\n" not in str(refusal.value)
    assert [path for path in tmp_path.iterdir() if path != source] == []


def test_bad_weights_are_one_line_on_the_command_line(single, tmp_path, capsys):
    source = tmp_path / "ouro"
    shutil.copytree(single, source)
    (source / "model.safetensors").write_bytes(b"?")
    assert cli.main(["convert", str(source), str(tmp_path / "melt"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("melt-serve: error: ") and "truncated or no safetensors" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
        ({"max_loops": 2}, "total_ut_steps=4 is outside 1..max_loops=2"),
        ({"gate_type": "fancy"}, "kv_gate_type"),
        ({"decode_mode": "fancy"}, "decode_mode"),
        ({"initial_state": "fancy"}, "kv_gate_initial_state"),
    ],
)
def test_bad_options_are_refused(options, message, single, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(single, tmp_path / "melt", show_progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_would_destroy_something_is_refused(single, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(single)
    for target, message in {
        tmp_path / "full": "exists and is not empty",
        tmp_path / "file": "is a file",
        single: "lies in the source",
        single / "inside": "lies in the source",
        tmp_path / "link" / "inside": "lies in the source",
    }.items():
        with pytest.raises(ConversionError, match=message):
            convert(single, target, show_progress=False)
    assert (tmp_path / "full" / "precious").read_text() == (tmp_path / "file").read_text() == "kept"
    assert not (single / "inside").exists()


@pytest.mark.parametrize("largest_file", [10_000, 50_000], ids=["in the source's shards", "in the gate's"])
def test_a_disk_that_fails_on_the_way_leaves_nothing_behind(largest_file, tmp_path):
    source = save_ouro(tmp_path / "ouro", max_shard_size="30KB")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            convert(source, tmp_path / "new" / "melt", show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("length", [250, 300], ids=["too long beside it", "too long itself"])
def test_a_name_too_long_for_the_disk_leaves_no_parents_behind(length, single, tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        convert(single, tmp_path / "new" / "parents" / ("x" * length), show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_callers_signal_handlers_are_its_own_again(single, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    convert(single, tmp_path / "melt", show_progress=False)
    broken = tmp_path / "broken"
    shutil.copytree(single, broken)
    poison(float("nan"))(broken)
    with pytest.raises(CheckpointError):
        convert(broken, tmp_path / "other", show_progress=False)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_conversion_to_the_same_target_that_is_at_work_is_not_disturbed(single, tmp_path):
    (tmp_path / ".melt.partial").mkdir()
    with pytest.raises(ConversionError, match="another conversion is at work, or was killed; remove it"):
        convert(single, tmp_path / "melt", show_progress=False)
    assert (tmp_path / ".melt.partial").exists()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """200 MB in shards of about 35 MB."""
    source = tmp_path_factory.mktemp("large") / "ouro"
    source.mkdir()
    config = LoopLMConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8
    )
    config.save_pretrained(source)
    tokenizer_of(BASE_TEMPLATE).save_pretrained(source)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, shape in weight_shapes(config):
        if sum(tensor.nbytes for tensor in shards[-1].values()) > 25e6:
            shards.append({})
        shards[-1][key] = torch.ones(shape)
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, source / f"{number}.safetensors")
        weight_map.update(dict.fromkeys(shard, f"{number}.safetensors"))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


MEASURE = """
import sys
from pathlib import Path
from melt_serve.convert import convert

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), show_progress=False)
print((peak() - before) * 1024)
"""


def test_memory_stays_near_one_shard(large, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, large, tmp_path / "melt"], capture_output=True, text=True, check=True
    )
    total = sum(path.stat().st_size for path in (tmp_path / "melt").glob("*.safetensors"))
    assert total > 200e6
    assert int(run.stdout) < 0.35 * total


@pytest.mark.parametrize(
    ("sent", "exit_codes"),
    [
        ((signal.SIGINT,), {130}),
        ((signal.SIGTERM,), {143}),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGTERM), {130, 143}),  # whichever the process sees first
    ],
    ids=["Ctrl-C", "SIGTERM", "impatience"],
)
def test_a_signal_in_mid_conversion_leaves_nothing_behind(sent, exit_codes, large, tmp_path):
    target = tmp_path / "new" / "melt"
    command = [sys.executable, "-m", "melt_serve.cli", "convert", large, target, "--quiet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_ctrl_c) as process:
        while not list(tmp_path.glob("new/.melt.partial/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.001)
        for each in sent:
            process.send_signal(each)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in exit_codes
    assert errors == b""
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_may_be_read_as_any_new_file(single, tmp_path):
    convert(single, tmp_path / "melt")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "melt").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}
