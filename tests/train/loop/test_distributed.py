"""Several processes compute what one does, and what one has begun they can finish."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from melt_serve.train.__main__ import main
from tests.signals import hear_ctrl_c
from tests.train.tiny_run import assert_close, logged, prepare, wait_for

WORDS = (
    "transition.interpolate=false",
    "transition.steps=2",
    "transition.loops=[2]",
    "alignment.steps=2",
    "alignment.loops=[2]",
    "micro_batch=1",
    "checkpoint_chunks=true",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    prepare(folder)
    return folder


def command(folder, name, *words):
    where = (f"output={folder / name}-melt", "--run-folder", str(folder / name))
    return ["run", str(folder / "recipe.toml"), *WORDS, *where, *words]


def heldout(folder):
    return [f"evaluation.files={folder}/chats.jsonl", "evaluation.documents=3", "evaluation.sample_tokens=2"]


def test_two_processes_have_the_losses_of_one_and_go_on_with_its_state(folder):
    """Gradients are added up over micro-batches and processes; FSDP on CPU, with gloo."""
    assert main(command(folder, "one", *heldout(folder))) == 0
    assert main(command(folder, "two", *heldout(folder), "--minutes", "0")) == 3
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "melt_serve.train", *command(folder, "two", *heldout(folder), "--resume")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_close(logged(folder / "two"), logged(folder / "one"))
    texts = [(folder / name / "evaluations.jsonl").read_text() for name in ("one", "two")]
    for first, second in zip(*(map(json.loads, text.splitlines()) for text in texts), strict=True):
        assert second["step"] == first["step"] and second["samples"] == first["samples"]
        for mode in ("token", "chunk"):
            assert second[mode]["kl"] == pytest.approx(first[mode]["kl"], rel=1e-3)
    assert len(texts[0].splitlines()) == 3  # before the first step, and at the end of both stages
    one, two = (AutoModelForCausalLM.from_pretrained(folder / f"{name}-melt").state_dict() for name in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=1e-4, rtol=1e-3)

    (folder / "two" / "alignment.state.pt").unlink()
    assert main(command(folder, "two", "--resume")) == 0  # and one goes on with the state of two
    assert_close(logged(folder / "two"), logged(folder / "one"))


def test_ctrl_c_ends_several_processes_as_one(folder):
    """In a terminal, where the launcher and all processes hear it."""
    words = command(folder, "stopped", "save_steps=1", "transition.steps=500", "--processes", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "melt_serve.train", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=hear_ctrl_c,
        start_new_session=True,
    )
    wait_for(folder / "stopped" / "transition.state.pt", process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.count("go on with: python -m melt_serve.train run") == 1 and "--processes 2 --resume" in said
    steps = len(logged(folder / "stopped"))
    assert main([*words[:-2], "--resume", "--minutes", "0"]) == 3
    assert len(logged(folder / "stopped")) == steps + 1


@pytest.mark.parametrize(
    ("word", "code", "says"),
    [("teacher=nowhere", 2, "nowhere does not exist; name the folder"), ("chunk_size=64", 1, "would lie in one chunk")],
    ids=["found by all", "found by the first"],
)
def test_an_error_of_several_processes_is_one_line_and_ends_them_all(folder, word, code, says):
    words = command(folder, "wrong", word, "--processes", "2")
    ended = subprocess.run(
        [sys.executable, "-m", "melt_serve.train", *words], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == code and ended.stderr.count("\n") == 1, ended.stderr
    assert says in ended.stderr


def test_bfloat16_is_near_float32_and_keeps_weights_in_float32(folder):
    """A learning rate that bfloat16 weights would round away."""
    words = ("transition.learning_rate=1e-5", "alignment.learning_rate=1e-5")
    assert main(command(folder, "exact", *words)) == 0
    assert main(command(folder, "rounded", *words, "dtype=bfloat16")) == 0
    exact, rounded = logged(folder / "exact"), logged(folder / "rounded")
    assert rounded != exact
    for one, other in zip(rounded, exact, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
    state = torch.load(folder / "rounded" / "alignment.state.pt", weights_only=True)["model"]
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").state_dict()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert state[weight].dtype == torch.float32
    assert 0 < (state[weight] - teacher[weight]).abs().max() < 1e-3
    assert AutoModelForCausalLM.from_pretrained(folder / "rounded-melt").dtype == torch.bfloat16
