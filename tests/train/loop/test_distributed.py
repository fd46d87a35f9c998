"""Several processes compute what one does, and what one has begun they can finish."""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from transformers import AutoModelForCausalLM

from melt_serve.train.__main__ import main
from melt_serve.train.loop import distributed
from melt_serve.train.session import Paused
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


@pytest.mark.parametrize("base", [["train_base=frozen"], ["train_base=lora", "lora_rank=3"]], ids=["frozen", "lora"])
def test_two_processes_beside_a_base_that_is_the_teachers_have_the_losses_of_one(folder, base):
    """Only what is trained is sharded."""
    one, two = (f"{base[0].partition('=')[2]}-{number}" for number in (1, 2))
    assert main(command(folder, one, *base)) == 0
    words = [*command(folder, two, *base), "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "melt_serve.train", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert_close(logged(folder / two), logged(folder / one))
    states = [torch.load(folder / each / "alignment.state.pt", weights_only=True)["model"] for each in (one, two)]
    assert states[0].keys() == states[1].keys() and all("_gate." in key or ".lora_" in key for key in states[0])
    for key, weight in states[0].items():
        torch.testing.assert_close(states[1][key], weight, atol=1e-4, rtol=1e-3)


@pytest.fixture
def group(monkeypatch):
    """This process as torchrun's only one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    for name, value in {**places, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    with distributed.process_group(torch.float32):
        yield distributed.waiting_group


def test_processes_wait_for_the_first_longer_than_nccl_does_and_not_in_its_queue(group):
    backend = group._get_backend(torch.device("cpu"))
    assert backend.name() == "gloo" and backend.options._timeout >= timedelta(hours=1)
    assert distributed.any_of([False, True]) == [False, True]


def test_where_one_process_fails_the_others_end(monkeypatch):
    def fail():
        raise OSError("full")

    assert distributed.ending_together(lambda: 3) == 3
    with pytest.raises(OSError, match="full"):
        distributed.ending_together(fail)
    told = []
    monkeypatch.setattr(distributed, "any_of", lambda flags: told.append(flags) or [True])
    with pytest.raises(Paused):
        distributed.ending_together(lambda: 3)
    with pytest.raises(OSError, match="full"):
        distributed.ending_together(fail)
    assert told == [[False], [True]]


def test_only_the_first_process_holds_the_whole_of_a_state(group, monkeypatch):
    model = torch.nn.Linear(4, 3)
    distributed.shard(model, torch.float32)
    expected = {key: weight.full_tensor() for key, weight in model.state_dict().items()}
    for number, by_all, there in ((0, False, True), (1, True, True), (1, False, False)):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        given = distributed.full_tensors(model.state_dict(), by_all)
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[key], expected[key]) if there else given[key] is None for key in expected)


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
    errors = [line for line in ended.stderr.splitlines() if line.startswith("melt_serve.train: error:")]
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    assert len(errors) == 1 and says in errors[0]


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
