"""A checkpoint by its name on the hub: each command fetches what it needs of it, or says at once why it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from melt_serve import cli
from melt_serve.checkpoint_path import CONFIG, CheckpointError, located
from melt_serve.serve import command
from melt_serve.server_process import free_port
from tests.hub import TOKEN, running_hub
from tests.ouro_files import write_ouro
from tests.test_checkpoint_config import llama

OTHER = "acme/llama"
OURO, OPEN = "acme/Ouro-tiny", ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = write_ouro(tmp_path_factory.mktemp("hub") / "ouro", {})
    for unneeded in ("modeling_ouro.py", "pytorch_model.bin", "Ouro-Q4.gguf", "figure.png"):
        (folder / unneeded).write_bytes(b"x")
    other = folder.parent / "llama"
    other.mkdir()
    llama(other)
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    names = {OURO: folder, "acme/private": folder, "acme/gated": folder, OTHER: other, "acme/adapter": adapter}
    with running_hub(names, private=("acme/private",), gated=("acme/gated",)) as running:
        yield running


@pytest.fixture(autouse=True)
def cache(hub, tmp_path, monkeypatch):
    """A user without token and with an empty cache, who knows this hub alone."""
    point_at(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", retried)
    hub.fetched.clear()
    return tmp_path / "hub"


def point_at(url: str, monkeypatch) -> None:
    """Do what HF_ENDPOINT does when the hub's library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


def retried(seconds: float) -> None:
    """Stand for a pause before the hub is asked again: a user waits for none."""
    raise AssertionError(f"waited {seconds} s")


def names(hub) -> set[str]:
    return {each.rpartition("/")[2] for each in hub.fetched}


def refusal(words: list[str], capsys) -> str:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    return said


def test_plan_fetches_the_config_alone(hub, capsys):
    assert cli.main(["plan", OURO]) == 0
    assert names(hub) == {"config.json"}
    assert capsys.readouterr().err == ""


def test_weights_come_with_what_belongs_to_them_and_nothing_else(hub, tmp_path):
    assert cli.main(["convert", f"{OURO}@v1", str(tmp_path / "melt"), "--quiet"]) == 0
    assert f"# {OURO}@v1, converted" in (tmp_path / "melt" / "README.md").read_text(), "not by a commit's hash"
    assert names(hub) == {*OPEN, "chat_template.jinja"} or names(hub) >= set(OPEN)
    assert not names(hub) & {"modeling_ouro.py", "pytorch_model.bin", "Ouro-Q4.gguf", "figure.png"}
    hub.fetched.clear()
    assert cli.main(["eval", OURO, "--questions", "1", "--loops", "1"]) == 0
    assert not hub.fetched, "it was in the cache"


def test_a_server_gets_the_folder_and_keeps_the_name(hub):
    words = command([f"{OURO}@v1", "--port", "1"])
    model = Path(words[words.index("--model") + 1])
    assert (model / "model.safetensors").is_file() and words[words.index("--served-model-name") + 1] == OURO
    assert "--reasoning-parser" in words
    assert Path(command([OURO, "--revision", "v1"])[4]) == model
    assert "mine" in command([OURO, "--served-model-name", "mine"])
    assert OURO not in command([OURO, "--served-model-name", "mine"])


@pytest.mark.parametrize("words", [["acme/llama"], [OURO, "--load-format=dummy"], ["org/any", "--download-dir", "x"]])
def test_what_is_no_looped_model_is_vllms_to_fetch(hub, words):
    assert command(words)[4] == words[0] and "--served-model-name" not in command(words)
    assert names(hub) <= {"config.json"}


WHAT_WORKS_ON = [["convert", OTHER, "melt"], ["convert", "--check", OTHER], ["eval", OTHER], ["verify", OTHER]]
WHAT_WORKS_ON += [["train", "data", "-", "--checkpoint", OTHER], ["train", "bundled", "--teacher", OTHER, "--out", "x"]]


@pytest.mark.parametrize("words", WHAT_WORKS_ON, ids=lambda words: " ".join(words))
def test_of_what_is_no_looped_model_the_config_alone_is_fetched(words, hub, capsys):
    assert "acme/llama is a 'llama' model, not a looped one" in refusal(words, capsys)
    assert names(hub) == {"config.json"}


def test_an_adapter_on_the_hub_is_called_one(hub, capsys):
    assert "is an adapter (PEFT) of acme/base" in refusal(["eval", "acme/adapter"], capsys)
    assert names(hub) == {"adapter_config.json"}


@pytest.mark.parametrize("before", [["plan"], ["eval"], ["verify"], ["serve"], ["train", "data", "-", "--checkpoint"]])
def test_a_name_that_the_hub_does_not_have_is_one_line(before, capsys):
    assert "acme/nothing is neither a folder here nor a model at http://127.0.0.1" in refusal(
        [*before, "acme/nothing"], capsys
    )


def test_a_teacher_is_fetched_by_name(hub, capsys, tmp_path):
    words = ["train", "run", "melt-1.6b", "data.files=-", f"output={tmp_path / 'out'}", "--run", str(tmp_path / "run")]
    assert "acme/nothing is neither" in refusal([*words, "teacher=acme/nothing"], capsys)
    assert cli.main([*words, "teacher=acme/llama"]) == 2
    said = capsys.readouterr().err
    assert names(hub) == {"config.json"}
    assert "acme/llama is a 'llama' model" in said


def test_private_and_gated_models_need_a_token(monkeypatch, capsys):
    assert "a private one needs a token (HF_TOKEN)" in refusal(["plan", "acme/private"], capsys)
    assert "acme/gated is gated: accept its terms at http://" in refusal(["plan", "acme/gated"], capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["plan", "acme/private"]) == cli.main(["plan", "acme/gated"]) == 0


def test_a_revision_that_is_not_there_is_named(capsys):
    assert f"{OURO} has no revision 'v9'" in refusal(["plan", f"{OURO}@v9"], capsys)


def test_without_a_network_what_is_cached_is_taken(hub, monkeypatch, capsys):
    assert cli.main(["plan", OURO]) == 0
    point_at(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert cli.main(["plan", OURO]) == 0
    capsys.readouterr()
    said = refusal(["convert", OURO, "melt"], capsys)
    assert "cannot be reached, and the cache in" in said and "does not have all of it" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["plan", OURO]) == 0
    capsys.readouterr()
    assert "HF_HUB_OFFLINE is set, and the cache in" in refusal(["plan", "acme/private"], capsys)


def test_a_folder_of_that_name_comes_first(tmp_path):
    (tmp_path / OURO).mkdir(parents=True)
    assert located(OURO) == Path(OURO)
    assert located(f"./{OURO}x") == Path(f"./{OURO}x")
    with pytest.raises(CheckpointError, match="does not exist; name the folder"):
        located("acme/a..b", CONFIG)


def test_the_command_finds_hub_and_cache_by_the_librarys_variables(hub, tmp_path):
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-m", "melt_serve.cli", "plan", OURO, "--json"]
    done = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and OURO in done.stdout
    assert list((tmp_path / "home" / "hub").glob("models--acme--Ouro-tiny/snapshots/*/config.json"))
