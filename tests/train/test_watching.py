"""Seeing a run work: what is logged and measured of it, a checkpoint of it before it is done, and where it is put."""

import json
import shutil
import struct
import sys
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.task.who_is_where import questions
from melt_serve.train.__main__ import main
from melt_serve.train.data.task_batches import encode
from melt_serve.train.distil.build import fresh_student, plain
from melt_serve.train.loop.export import loss_table
from melt_serve.train.loop.logs import read_log
from melt_serve.train.recipe_files import load_recipe
from tests.hub import TOKEN, running_hub
from tests.test_checkpoint_path import point_at
from tests.train.tiny_run import prepare

LOGGER = """
from contextlib import contextmanager

@contextmanager
def note(folder, stage, step):
    with (folder / "noted.txt").open("a") as file:
        yield lambda numbers, step: file.write(f"{stage} {step} {sorted(numbers)}\\n")
"""
WORDS = ("evaluation.steps=3", "evaluation.documents=5", "evaluation.length=64", "evaluation.sample_tokens=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that is measured every three steps, of four and four, and keeps all states."""
    folder = tmp_path_factory.mktemp("watched")
    prepare(folder)
    asked = list(islice(questions("heldout", "watch", 4), 5))
    chats = [[{"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.reply}] for each in asked]
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "my_logger.py").write_text(LOGGER)
    sys.path.insert(0, str(folder))
    try:
        assert run(folder, "run", "--minutes", "0") == 3
        assert run(folder, "run", "save_steps=1", "keep_last=9", "--resume") == 0
    finally:
        sys.path.remove(str(folder))
    return folder


def run(folder, name, *words):
    heldout = ["evaluation.files=" + str(folder / "heldout.jsonl"), "report_to=['tensorboard', 'my_logger:note']"]
    where = [f"output={folder / name}-melt", "--run", str(folder / name)]
    return main(["run", str(folder / "recipe.toml"), *heldout, *WORDS, *where, *words])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(melt, folder):
    """Measure the last loop plainly: all logits of the reference model, of each decode mode."""
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    batch = encode(list(islice(questions("heldout", "watch", 4), 5)), build_tokenizer())
    found, before = {}, melt.config.decode_mode
    wanted = teacher(batch.input_ids, batch.attention_mask).logits[batch.before_reply]
    targets = batch.labels.roll(-1, 1)[batch.before_reply]
    for mode in ("token", "chunk"):
        melt.config.decode_mode = mode
        lengths = batch.prompt_lengths if mode == "token" else None
        given = melt(batch.input_ids, batch.attention_mask, prompt_lengths=lengths).logits[batch.before_reply]
        kl = F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True) / len(given)
        agreement = (given.argmax(-1) == wanted.argmax(-1)).float().mean()
        found[mode] = [kl.item(), agreement.item(), F.cross_entropy(given, targets).item()]
    melt.config.decode_mode = before
    return found


@torch.no_grad()
def test_held_out_distances_are_those_of_the_reference_model_before_the_first_step_and_after_the_last(folder):
    entries = lines(folder / "run" / "evaluations.jsonl")
    places = [(entry["stage"], entry["step"]) for entry in entries]
    assert places == [("transition", 0), ("transition", 3), ("transition", 4), ("alignment", 3), ("alignment", 4)]
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    fresh = plain(fresh_student(load_recipe(str(folder / "recipe.toml")), teacher))
    trained = AutoModelForCausalLM.from_pretrained(folder / "run-melt").eval()
    for melt, entry in ((fresh, entries[0]), (trained, entries[-1])):
        for mode, expected in measured(melt, folder).items():
            logged = [entry[mode][part][-1] for part in ("kl", "agreement", "ce")]
            assert logged == pytest.approx(expected, rel=1e-4), mode
            assert len(entry[mode]["kl"]) == 3
        assert entry["teacher"]["ce"][-1] > 0
    # A fresh gate is the running mean, but for the small spread of its matrices.
    assert entries[0]["z"] == pytest.approx({"2": 1 / 2, "3": 2 / 3}, abs=0.05) and entries[-1]["z"] != entries[0]["z"]
    assert [len(entry["samples"]) for entry in entries] == [2] * 5
    sample = entries[-1]["samples"][0]
    assert sample["prompt"].endswith("<|im_start|>assistant\n") and sample["wanted"] and sample["answer"]


def test_measuring_changes_nothing(folder):
    """Nor does being cut into sessions where a measurement is due."""
    recipe = str(folder / "recipe.toml")
    assert main(["run", recipe, f"output={folder}/plain-melt", "--run", str(folder / "plain")]) == 0
    one, other = (lines(folder / name / "losses.jsonl") for name in ("run", "plain"))
    assert [entry["loss"] for entry in one] == [entry["loss"] for entry in other]


def test_every_step_logs_its_rates_and_every_loops_part(folder):
    entries = lines(folder / "run" / "losses.jsonl")
    for number, entry in enumerate(entries):
        assert len(entry["kd_by_loop"]) == entry["loops_asked"]
        assert sum(entry["kd_by_loop"]) / entry["loops_asked"] == pytest.approx(entry["kd"], rel=1e-5, abs=1e-9)
        assert entry["tokens_per_second"] > 0 and entry["flops_per_second"] > 0
        assert entry.get("alpha") == (pytest.approx(number / 3) if entry["stage"] == "transition" else None)
    assert [entry["learning_rate"] for entry in entries[4:]] == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


def test_numbers_go_to_every_logger_that_is_named(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    noted = (folder / "run" / "noted.txt").read_text().splitlines()
    assert sum("'kd_by_loop/2'" in line for line in noted) == 8
    assert sum("'evaluation/token/kl/3'" in line for line in noted) == 5
    events = EventAccumulator(str(folder / "run" / "tensorboard" / "alignment")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("evaluation/chunk/kl/3")]
    entries = [each for each in lines(folder / "run" / "evaluations.jsonl") if each["stage"] == "alignment"]
    assert shown == [(each["step"], pytest.approx(each["chunk"]["kl"][-1])) for each in entries]
    of_loops = sorted(tag for tag in events.Tags()["scalars"] if "/z/" in tag)
    assert of_loops == ["evaluation/z/2", "evaluation/z/3"], "loop 1 has no z"


def test_weights_and_biases_that_is_not_installed_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(folder, "none", "report_to=wandb") == 1
    assert "report_to=wandb needs Weights & Biases: pip install wandb" in capsys.readouterr().err
    assert not (folder / "none").exists(), "nothing is written down that a resumed run would ask for again"


def offline_records(path):
    """Read what Weights & Biases keeps for later: protobuf records in blocks of 32 KiB, as in a log of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_weights_and_biases_gets_every_sessions_numbers_and_no_session_is_a_crash(folder, capfd, monkeypatch):
    """Where it is installed; without its server."""
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(folder, "biased", "report_to=wandb", "--minutes", "0") == 3
    assert run(folder, "biased", "report_to=wandb", "--resume") == 0
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    own = f"biased-{(folder / 'biased' / 'wandb.id').read_text().strip()}"
    found, runs, codes = {}, set(), set()
    for path in sorted((folder / "biased" / "wandb").rglob("*.wandb")):
        stage = path.stem.rpartition("-")[2]
        for record in offline_records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    runs.add((record.run.run_id, record.run.run_group))
                case "exit":
                    codes.add(record.exit.exit_code)
                case "history":
                    numbers = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    if "loss" in numbers:
                        found[stage, int(numbers["at_step"])] = json.loads(numbers["loss"])
    assert runs == {(f"{own}-{stage}", own) for stage in ("transition", "alignment")} and codes == {0}
    entries = lines(folder / "biased" / "losses.jsonl")
    assert found == {(entry["stage"], entry["step"]): pytest.approx(entry["loss"]) for entry in entries}


def test_a_checkpoint_of_a_run_that_goes_on_is_that_of_its_state(folder, capsys, monkeypatch):
    words = ["export", str(folder / "run")]
    assert main([*words, str(folder / "now")]) == 0
    assert "after 4 steps of alignment" in capsys.readouterr().out
    now, done = ((folder / name / "model.safetensors").read_bytes() for name in ("now", "run-melt"))
    assert now == done
    state = folder / "run" / "states" / "alignment-000002.state.pt"
    assert main([*words, str(folder / "then"), "--state", str(state)]) == 0
    weights = AutoModelForCausalLM.from_pretrained(folder / "then").state_dict()
    saved = torch.load(state, weights_only=True)["model"]
    assert all(torch.equal(weight, saved[key]) for key, weight in weights.items())
    card = (folder / "then" / "README.md").read_text()
    assert "It is the run after 2 steps of alignment." in " ".join(card.split())
    log = read_log(folder / "run" / "losses.jsonl")
    assert loss_table(log) not in card
    assert loss_table([each for each in log if each["stage"] == "transition" or each["step"] < 2]) in card
    monkeypatch.chdir(folder)
    assert main([*words, "300"]) == 0 and (folder / "300" / "config.json").exists()


def test_a_checkpoint_of_a_run_that_was_killed_while_it_logged_is_that_of_its_state(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "torn")
    with (tmp_path / "torn" / "losses.jsonl").open("a") as log:
        log.write('{"stage": "alignment", "step": 4, "lo')
    assert main(["export", str(tmp_path / "torn"), str(tmp_path / "now")]) == 0
    assert loss_table(read_log(folder / "run" / "losses.jsonl")) in (tmp_path / "now" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{folder}/nowhere", "{folder}/out"], "nowhere holds no run of a post-training"),
        (["{folder}/run", "{folder}/teacher"], "holds something that is not a MELT checkpoint"),
        (["{folder}/run", "{folder}/out", "--state", "{folder}/recipe.toml"], "cannot be read"),
        (
            ["{folder}/run", "{folder}/out", "--state", "{folder}/mine.state.pt"],
            "is not named after a stage of the run",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line(folder, capsys, words, says):
    shutil.copy(folder / "run" / "alignment.state.pt", folder / "mine.state.pt")
    assert main(["export", *(word.format(folder=folder) for word in words)]) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and not (folder / "out").exists()


def test_a_checkpoint_is_pushed_to_the_hub(folder, monkeypatch, capsys):
    with running_hub({}) as hub:
        point_at(hub.url, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert main(["export", str(folder / "run"), str(folder / "pushed"), "--push", "acme/melt-tiny"]) == 0
        assert f"pushed to {hub.url}/acme/melt-tiny" in capsys.readouterr().out
        files = {path.name: path.read_bytes() for path in (folder / "pushed").iterdir()}
        assert hub.pushed == {"acme/melt-tiny": files} and "model.safetensors" in files
        monkeypatch.setenv("HF_TOKEN", "hf_of-another")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        assert run(folder, "run", "--resume", "--push", "acme/melt-tiny") == 1
    said = capsys.readouterr().err
    assert "it needs a token that may write (HF_TOKEN). The checkpoint is in" in said and "Traceback" not in said
    assert main(["run", "demo", "--run", str(folder / "demo"), "--push", "acme/melt-tiny"]) == 1
    assert "--push=acme/melt-tiny: only what a post-training makes is pushed" in capsys.readouterr().err
