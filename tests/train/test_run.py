"""A LoopLM of one's own into a MELT, on the command line: it learns, survives, and writes what is served."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melt_serve import checkpoint_path
from melt_serve.checkpoint_check import check_checkpoint
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.train.__main__ import main
from melt_serve.train.distil.build import fresh_student
from melt_serve.train.distil.phase import drawn_chunk_size
from melt_serve.train.recipe_files import load_recipe
from melt_serve.train.stages import Distillation
from tests.signals import hear_ctrl_c
from tests.train.tiny_run import assert_close, logged, prepare, wait_for


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = prepare(folder)
    assert main(["run", str(recipe), "--run", str(folder / "run")]) == 0
    return folder


def run(folder, name, *words):
    return main(
        ["run", str(folder / "recipe.toml"), f"output={folder / name}-melt", "--run", str(folder / name), *words]
    )


def start(folder, name, *words, **arguments):
    """Start the same in a process of its own."""
    command = ["run", str(folder / "recipe.toml"), f"output={folder / name}-melt", "--run", str(folder / name), *words]
    return subprocess.Popen(
        [sys.executable, "-m", "melt_serve.train", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **arguments,
    )


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_what_comes_out_is_a_plain_melt_checkpoint(unbroken):
    melt = AutoModelForCausalLM.from_pretrained(unbroken / "melt")
    assert type(melt) is MeltForCausalLM and melt.dtype == torch.float32
    config = json.loads((unbroken / "melt" / "config.json").read_text())
    assert config["model_type"] == "melt" and config["architectures"] == ["MeltForCausalLM"]
    assert (config["chunk_size"], config["decode_mode"], config["max_loops"]) == (16, "chunk", 3)
    tokenizer = AutoTokenizer.from_pretrained(unbroken / "melt")
    assert tokenizer.chat_template == build_tokenizer().chat_template
    card = (unbroken / "melt" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "`teacher`" in card and "| transition | kd |" in card
    names = {path.name for path in (unbroken / "melt").iterdir()}
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    generation = json.loads((unbroken / "melt" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]


def test_the_student_starts_as_the_teacher_and_learns(unbroken):
    entries = logged(unbroken / "run")
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        (stage, step) for stage in ("transition", "alignment") for step in range(4)
    ]
    assert entries[0]["kd"] < 1e-6 < entries[1]["kd"]
    for entry in entries[4:]:
        assert entry["loss"] == pytest.approx(entry["kd"] + 0.1 * entry["attention"])
    teacher = AutoModelForCausalLM.from_pretrained(unbroken / "teacher")
    assert type(teacher) is OuroForCausalLM
    trained = AutoModelForCausalLM.from_pretrained(unbroken / "melt").state_dict()
    moved = [key for key, weight in teacher.state_dict().items() if not torch.equal(weight, trained[key])]
    assert len(moved) == len(teacher.state_dict()) - 2  # but the exit gate, which no token has learnt to use


def test_a_run_leaves_its_recipe_logs_and_a_plot(unbroken):
    run = unbroken / "run"
    assert json.loads((run / "recipe.json").read_text())["batch_tokens"] == 256
    picture = (run / "losses.svg").read_text()
    assert picture.startswith("<?xml") and "</svg>" in picture
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "alignment")).Reload()
    entries = [entry for entry in logged(run) if entry["stage"] == "alignment"]
    for part in ("loss", "kd", "attention", "gradient_norm"):
        shown = [(event.step, event.value) for event in events.Scalars(part)]
        assert shown == [(entry["step"], pytest.approx(entry[part])) for entry in entries]


def test_micro_batches_are_one_batch(unbroken):
    """The gradients of a step do not depend on how many sequences are run at once.

    Without mixed rows: at alpha 0 the gradient is rounding alone, which AdamW makes a step of.
    """
    for size in (1, 4):
        assert run(unbroken, f"micro-{size}", f"micro_batch={size}", "transition.interpolate=false") == 0
    assert_close(logged(unbroken / "micro-1"), logged(unbroken / "micro-4"))


def test_many_sessions_are_the_unbroken_run_bit_for_bit(unbroken):
    for _ in range(3):
        assert run(unbroken, "sessions", "--minutes", "0", "--resume") == 3
        assert not (unbroken / "sessions-melt").exists()
    assert len(logged(unbroken / "sessions")) == 3
    assert run(unbroken, "sessions", "--resume") == 0
    assert logged(unbroken / "sessions") == logged(unbroken / "run")
    assert weights(unbroken / "sessions-melt") == weights(unbroken / "melt")


def test_ctrl_c_saves_and_after_kill_9_a_run_goes_on_bit_for_bit(unbroken):
    state = unbroken / "killed" / "transition.state.pt"
    process = start(unbroken, "killed", "save_steps=1", preexec_fn=hear_ctrl_c)
    wait_for(state, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "paused, everything is saved; go on with: python" in said, said
    assert "Traceback" not in said and "--resume" in said
    done = len(logged(unbroken / "killed"))
    assert done >= 1 and (unbroken / "killed" / "losses.svg").exists()

    state.unlink()  # as if it had been killed before anything was saved
    process = start(unbroken, "killed", "save_steps=1", "--resume")
    wait_for(state, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (unbroken / "killed-melt").exists()
    process.communicate()
    assert run(unbroken, "killed", "--resume") == 0
    assert logged(unbroken / "killed") == logged(unbroken / "run")
    assert weights(unbroken / "killed-melt") == weights(unbroken / "melt")


def test_after_kills_at_random_moments_nothing_is_lost():
    """A few of those that `python -m tests.train.kills` does."""
    words = [sys.executable, "-m", "tests.train.kills", "--kills", "3"]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout)
    assert counts["kills"] == 3 and counts["runs done"] >= 1


@contextmanager
def files_of_at_most(size):
    """Let the disk take no larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if line.startswith("melt_serve.train: error:")]
    assert len(said) == 1 and "Traceback" not in "".join(lines)
    return said[0]


def test_a_disk_that_is_full_ends_the_run_and_keeps_what_is_saved(unbroken, capsys):
    assert run(unbroken, "full", "--minutes", "0") == 3
    state = unbroken / "full" / "transition.state.pt"
    before = state.read_bytes()
    capsys.readouterr()
    with files_of_at_most(100_000):
        assert run(unbroken, "full", "--resume", "--minutes", "0") == 1
    said = one_error(capsys)
    assert "transition.state.pt cannot be saved" in said and "File too large" in said and "is whole" in said
    assert state.read_bytes() == before and not list((unbroken / "full").glob(".*partial"))
    assert run(unbroken, "full", "--resume") == 0
    assert logged(unbroken / "full") == logged(unbroken / "run")


def test_a_disk_too_full_for_the_checkpoint_keeps_the_one_before(unbroken, capsys):
    before = weights(unbroken / "melt")
    with files_of_at_most(100_000):
        assert main(["run", str(unbroken / "recipe.toml"), "--run", str(unbroken / "run"), "--resume"]) == 1
    assert "cannot be written" in one_error(capsys)
    assert weights(unbroken / "melt") == before
    assert not list(unbroken.glob(".*partial"))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_is_saved(unbroken, capsys):
    words = ("transition.learning_rate=1e30", "save_steps=1")
    assert run(unbroken, "nan", *words, "--minutes", "0") == 3
    before = (unbroken / "nan" / "transition.state.pt").read_bytes()
    assert run(unbroken, "nan", *words, "--resume") == 1
    assert "transition: the gradient of step 1 is not finite (loss " in one_error(capsys)
    assert (unbroken / "nan" / "transition.state.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.files={folder}/nothing.jsonl"], "No such file or directory"),
        (["data.files={folder}/recipe.toml"], "is none of: a .jsonl or .parquet file"),
        (["output={folder}"], "holds something that is not a MELT checkpoint"),
        (["sequence_length=512", "batch_tokens=4096"], "max_position_embeddings=256"),
        (["alignment.decode_aware_from=0.5"], "in chunk mode answers are decoded as the grid is trained"),
        (
            ["alignment.decode_aware_from=0.5", "alignment.decode_aware_by=tokens", "decode_mode=token"],
            "set data.pack=false, or decode_aware_by=passes",
        ),
        (["stages=3"], "there is no field stages"),
        (["chunk_size=1000000", "sequence_length=128"], "no MELT: chunk_size must be at most 262144, not 1000000"),
        (["chunk_size=8", "--run", "{folder}/run", "--resume"], "another recipe (chunk_size differ)"),
        (["--run", "{folder}/run"], "holds a run already: add --resume"),
    ],
)
def test_what_cannot_be_run_is_one_line(unbroken, capsys, words, says):
    words = [word.format(folder=unbroken) for word in words]
    assert main(["run", str(unbroken / "recipe.toml"), "--run", str(unbroken / "none"), *words]) == 1
    assert says in one_error(capsys)


def test_a_teacher_that_is_not_whole_is_refused_before_anything_is_written(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken / "teacher", tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run(unbroken, "torn", f"teacher={tmp_path}/nowhere") == 2
    assert "nowhere does not exist; name the folder" in one_error(capsys)
    assert run(unbroken, "torn", f"teacher={unbroken}/melt") == 2
    assert "melt is a MELT checkpoint already" in one_error(capsys)
    assert run(unbroken, "torn", f"teacher={tmp_path}/torn") == 2
    said = one_error(capsys)
    assert f"teacher={tmp_path}/torn cannot be post-trained: " in said and "truncated or no safetensors" in said
    assert not (unbroken / "torn").exists()


@pytest.fixture
def begun(unbroken, tmp_path):
    """A run that has done a step, with a teacher and data of its own."""
    shutil.copytree(unbroken / "teacher", tmp_path / "teacher")
    shutil.copy(unbroken / "chats.jsonl", tmp_path / "chats.jsonl")
    (tmp_path / "recipe.toml").write_text((unbroken / "recipe.toml").read_text().replace(str(unbroken), str(tmp_path)))
    assert run(tmp_path, "begun", "--minutes", "0") == 3
    return tmp_path


def test_a_teacher_that_may_not_be_asked_for_a_stages_loops_is_refused(begun, capsys):
    config = begun / "teacher" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "total_ut_steps": 2, "max_loops": 2}))
    capsys.readouterr()
    assert run(begun, "deep") == 1
    assert "transition.loops=[2, 3] is more than the teacher's max_loops=2; name fewer" in one_error(capsys)
    assert not (begun / "deep").exists()


def test_a_teacher_on_the_hub_is_called_by_its_name_in_every_session(begun, tmp_path, monkeypatch):
    """Wherever the hub's cache has its files."""
    monkeypatch.chdir(tmp_path)
    snapshots = (tmp_path / str(number) for number in itertools.count())

    def fetched(*_):
        return shutil.copytree(begun / "teacher", next(snapshots))

    monkeypatch.setattr(checkpoint_path, "fetched", fetched)
    assert run(begun, "hub", "teacher=acme/Ouro-tiny", "--minutes", "0") == 3
    assert json.loads((begun / "hub" / "recipe.json").read_text())["teacher"] == "acme/Ouro-tiny"
    assert run(begun, "hub", "teacher=acme/Ouro-tiny", "--resume") == 0
    card = (begun / "hub-melt" / "README.md").read_text()
    assert "from the LoopLM `acme/Ouro-tiny`" in " ".join(card.split()) and "license: mit" in card


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_data(path):
    path.write_text(path.read_text().replace("Rome", "Bern"))


@pytest.mark.parametrize(
    ("name", "change"),
    [("teacher/model.safetensors", flip_a_bit), ("chats.jsonl", other_data)],
    ids=["teacher", "data"],
)
def test_a_run_goes_on_with_the_teacher_and_the_data_that_it_began_with(begun, capsys, name, change):
    """Of the same name and size, too."""
    shutil.copy(begun / name, begun / "kept")
    change(begun / name)
    capsys.readouterr()
    assert run(begun, "begun", "--resume", "--minutes", "0") == 1
    assert f"{begun / name} is not what the run in {begun / 'begun'} was begun with; put back" in one_error(capsys)
    shutil.copy(begun / "kept", begun / name)
    assert run(begun, "begun", "--resume", "--minutes", "0") == 3
    assert len(logged(begun / "begun")) == 2


def test_a_run_of_before_that_wrote_no_inputs_goes_on(begun):
    (begun / "begun" / "inputs.json").unlink()
    assert run(begun, "begun", "--resume", "--minutes", "0") == 3
    assert (begun / "begun" / "inputs.json").exists()


def test_a_damaged_state_is_one_line_and_the_one_before_it_goes_on_bit_for_bit(unbroken, begun, capsys):
    assert run(begun, "begun", "--resume", "--minutes", "0") == 3
    state = begun / "begun" / "transition.state.pt"
    flip_a_bit(state)
    capsys.readouterr()
    assert run(begun, "begun", "--resume") == 1
    said = one_error(capsys)
    assert "of step 1, is whole. Go on from there: mv " in said
    shutil.move(*said.rpartition("mv ")[2].split())
    assert run(begun, "begun", "--resume") == 0
    assert logged(begun / "begun") == logged(unbroken / "run")


def test_what_comes_out_has_checksums_and_is_whole(unbroken):
    checked = check_checkpoint(unbroken / "melt")
    assert checked is not None and checked.compared == 6


def test_a_broken_line_is_named_by_file_and_number(unbroken, tmp_path, capsys):
    good = (unbroken / "chats.jsonl").read_text().splitlines()
    for line, says in (("{", "not JSON"), ('{"messages": [{"role": "user", "content": "Hi"}]}', "nothing to learn")):
        (tmp_path / "chats.jsonl").write_text("\n".join([good[0], line, good[1]]))
        assert run(unbroken, "broken", f"data.files={tmp_path}/chats.jsonl") == 1
        said = one_error(capsys)
        assert f"{tmp_path}/chats.jsonl:2: " in said and says in said
        shutil.rmtree(unbroken / "broken")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    said = capsys.readouterr().out
    for taught in ("demo, melt-1.6b, melt-1.6b-paper", '{"messages"', "--resume", "chunk_size=500"):
        assert taught in said


@pytest.mark.parametrize("words", [["train_base=frozen"], ["train_base=lora", "lora_rank=3"]], ids=["frozen", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_the_teachers_own_base_a_run_saves_only_what_it_trains_and_goes_on_bit_for_bit(unbroken, words, dtype):
    """In bfloat16 as FSDP runs it, which shares the base out to nobody."""
    whole, name = [*words, f"dtype={dtype}"], f"{words[0]}-{dtype}"
    assert run(unbroken, name, *whole) == 0
    assert run(unbroken, f"{name}-cut", *whole, "--minutes", "0") == 3
    assert run(unbroken, f"{name}-cut", *whole, "--resume") == 0
    assert logged(unbroken / f"{name}-cut") == logged(unbroken / name)
    assert weights(unbroken / f"{name}-cut-melt") == weights(unbroken / f"{name}-melt")
    state = torch.load(unbroken / name / "alignment.state.pt", weights_only=True)["model"]
    assert state and all("_gate." in key or ".lora_" in key for key in state)
    teacher = AutoModelForCausalLM.from_pretrained(unbroken / "teacher", dtype=getattr(torch, dtype)).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(unbroken / f"{name}-melt", dtype=getattr(torch, dtype)).state_dict()
    moved = {key.split(".")[-2] for key, weight in teacher.items() if not torch.equal(weight, trained[key])}
    assert moved == ({"q_proj", "k_proj", "v_proj", "o_proj"} if "train_base=lora" in words else set())
    card = " ".join((unbroken / f"{name}-melt" / "README.md").read_text().split())
    assert ("adapters of rank 3" if "train_base=lora" in words else "Only the gates were trained") in card


def test_a_run_of_before_that_could_only_train_its_whole_base_goes_on(begun):
    noted = begun / "begun" / "recipe.json"
    facts = json.loads(noted.read_text())
    noted.write_text(json.dumps({key: value for key, value in facts.items() if key not in ("train_base", "lora_rank")}))
    assert run(begun, "begun", "--resume", "--minutes", "0") == 3


def test_a_finished_runs_gate_can_be_cut_to_a_rank(unbroken):
    """No step is run again, and nothing but the gate is another."""
    shutil.copytree(unbroken / "run", unbroken / "cut")
    assert run(unbroken, "cut", "--resume", "gate_rank=3") == 0
    assert logged(unbroken / "cut") == logged(unbroken / "run")
    whole, cut = (AutoModelForCausalLM.from_pretrained(unbroken / each) for each in ("melt", "cut-melt"))
    assert cut.config.kv_gate_rank == 3 and "cut to rank 3" in (unbroken / "cut-melt" / "README.md").read_text()
    assert cut.config.to_diff_dict() == {**whole.config.to_diff_dict(), "kv_gate_rank": 3}
    of_cut = cut.state_dict()
    changed = {key for key, each in whole.state_dict().items() if not torch.equal(each, of_cut[key])}
    gates = {key for key in of_cut if "kv_gate." in key and key.endswith("_proj.weight")}
    assert changed == gates and len(gates) == 4  # W_z and U_z of two layers


def test_the_gate_starts_where_the_recipe_says(unbroken):
    teacher = AutoModelForCausalLM.from_pretrained(unbroken / "teacher")

    def gates(*words):
        recipe = load_recipe(str(unbroken / "recipe.toml"), words)
        return [layer.self_attn.kv_gate for layer in fresh_student(recipe, teacher).model.layers]

    for bias in (-2.0, 0.0):
        assert all((gate.input_proj.bias == bias).all() for gate in gates(f"gate_start={bias}"))
    means = torch.tensor([0, math.log(2)])[:, None]  # loops 2 and 3 of three
    for words in ([], ["gate_type=scalar"], ["trained_rank=3"]):
        assert all(torch.equal(gate.loop_bias, means.expand_as(gate.loop_bias)) for gate in gates(*words))
    assert gates("trained_rank=3")[1].input_down.weight.shape == (3, 32)
    assert not any(gate.learned for gate in gates("gate_type=mean"))


def test_packs_run_at_chunk_sizes_drawn_for_each_batch_and_in_two_passes(unbroken):
    """Documents that began on multiples of 16 only would be refused at 32."""
    words = ["decode_mode=token", "alignment.chunk_sizes=[8, 16, 32]", "alignment.decode_aware_from=0"]
    assert run(unbroken, "drawn", *words) == 0
    before, drawn = ([line["kd"] for line in logged(unbroken / each)] for each in ("run", "drawn"))
    assert drawn[:4] == before[:4] and len(drawn) == len(before)
    assert not set(drawn[5:]) & set(before[5:])
    assert AutoModelForCausalLM.from_pretrained(unbroken / "drawn-melt").config.chunk_size == 16
    stage = Distillation(steps=40, learning_rate=1.0, chunk_sizes=(8, 16, 32))
    sizes = [drawn_chunk_size(stage, step) for step in range(40)]
    assert set(sizes) == {8, 16, 32} and sizes == [drawn_chunk_size(stage, step) for step in range(40)]
