"""Several processes compute what one does, and what one has begun they can finish."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from melt_serve.train.__main__ import main
from tests.train.tiny_run import assert_close, logged, prepare

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


def test_two_processes_have_the_losses_of_one_and_go_on_with_its_state(folder):
    """Gradients are added up over micro-batches and processes; FSDP on CPU, with gloo."""
    assert main(command(folder, "one")) == 0
    assert main(command(folder, "two", "--minutes", "0")) == 3
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "melt_serve.train", *command(folder, "two", "--resume")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_close(logged(folder / "two"), logged(folder / "one"))
    one, two = (AutoModelForCausalLM.from_pretrained(folder / f"{name}-melt").state_dict() for name in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=1e-4, rtol=1e-3)

    (folder / "two" / "alignment.state.pt").unlink()
    assert main(command(folder, "two", "--resume")) == 0  # and one goes on with the state of two
    assert_close(logged(folder / "two"), logged(folder / "one"))


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
