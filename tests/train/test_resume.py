"""What is checked before a run's first step, and what may change when it goes on: no hour of a run is lost."""

import json
import math
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from melt_serve.task.tokenizer import VOCABULARY
from melt_serve.train import checks
from melt_serve.train.__main__ import main
from melt_serve.train.loop.logs import read_log
from tests.ouro_files import PUBLISHED_OURO
from tests.train.tiny_run import logged, prepare

SHORT = ("transition.steps=2", "alignment.steps=2", "transition.loops=[2]", "alignment.loops=[2]")


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path)
    return tmp_path


def run(folder, name, *words):
    output = f"output={folder / name}-melt"
    return main(["run", str(folder / "recipe.toml"), *SHORT, output, "--run", str(folder / name), *words])


def said(capsys):
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("melt_serve.train: error:")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines)
    return errors[0]


def spoil_weight(folder):
    path = folder / "teacher" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})


def more_tokens(folder):
    path = folder / "teacher" / "tokenizer.json"
    fields = json.loads(path.read_text())
    words = fields["model"]["vocab"]
    words["one-too-many"] = VOCABULARY
    path.write_text(json.dumps(fields))


def no_tokenizer(folder):
    for path in (folder / "teacher").glob("tokenizer*"):
        path.unlink()


def other_width(folder):
    path = folder / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 48}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_weight, "model.layers.1.mlp.up_proj.weight"),
        (more_tokens, "outside the vocabulary that config.json states"),
        (no_tokenizer, "has no tokenizer that can be read"),
        (other_width, "config.json implies"),
    ],
)
def test_a_teacher_that_would_spoil_the_run_is_one_line_before_the_first_step(folder, capsys, spoil, says):
    spoil(folder)
    assert run(folder, "run") == 2
    message = said(capsys)
    assert says in message and f"teacher={folder}/teacher cannot be post-trained" in message
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["max_loops=1"], "max_loops"),
        (["chunk_size=64"], "sequence_length=64 is not more than chunk_size=64: all tokens would lie in one chunk"),
        (["chunk_size=63"], "0.0% of what is learnt"),
        (["report_to=nothing:here"], "there is no logger 'nothing:here'"),
        (["evaluation.files={folder}/none.jsonl"], "No such file"),
        (["order=['alignment', 'polish']"], "order: there is no stage 'polish'"),
        (["order=['alignment', 'alignment']"], "each of them once"),
        (["further.polish.stepz=3"], "there is no field further.polish.stepz; did you mean steps?"),
        (["data.weights=[1, 2]"], "data.weights: 2 of them, and 1 data.files"),
        (["student={folder}/teacher", "transition.interpolate=false"], "is no MELT"),
        (["student={folder}/teacher"], "transition.interpolate=true: a student that is a MELT"),
    ],
)
def test_what_would_teach_nothing_or_end_later_is_one_line_before_the_first_step(folder, capsys, words, says):
    assert run(folder, "run", *(word.format(folder=folder) for word in words)) in (1, 2)
    assert says in said(capsys)
    assert not (folder / "run" / "losses.jsonl").exists()


def test_few_learnt_tokens_beyond_their_first_chunk_are_a_warning(folder, capsys):
    assert run(folder, "run", "chunk_size=46", "--minutes", "0") == 3
    assert "consider a smaller chunk_size" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_the_first_step(folder, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    assert run(folder, "run") == 2
    assert "GB free; free some, or choose another disk" in said(capsys)
    assert not (folder / "run" / "losses.jsonl").exists()


@pytest.mark.parametrize(
    "words", [[], ["train_base=frozen"], ["train_base=lora", "lora_rank=3"]], ids=lambda words: words
)
def test_the_room_that_is_asked_for_is_what_the_run_takes(folder, monkeypatch, words):
    """Two states of each stage, and one while it is written; what is there under two names counts once."""
    asked = {}
    monkeypatch.setattr(checks, "check_space", lambda target, needed: asked.update({target.name: needed}))
    assert run(folder, "run", "keep_last=2", "save_steps=1", *words) == 0
    state = torch.load(folder / "run" / "alignment.state.pt", weights_only=True)
    moments = [each for entry in state["optimizers"][0]["state"].values() for each in entry.values() if each.ndim]
    weights = sum(each.nbytes for each in state["model"].values())
    assert asked["states"] == 5 * 3 * weights
    assert 1.8 * weights < sum(each.nbytes for each in moments) <= 2 * weights  # no token has left: that gate has none
    assert (folder / "run-melt" / "model.safetensors").stat().st_size == pytest.approx(asked["run-melt"], rel=0.1)
    kept = {path.stat().st_ino: path.stat().st_size for path in (folder / "run").rglob("*.state.pt*")}
    assert len(kept) == 4 and len(list((folder / "run").rglob("*.state.pt*"))) == 8
    needed = asked["states"]
    assert run(folder, "run", "keep_last=2", "save_steps=1", *words, "--resume") == 0
    assert asked["states"] == max(0, needed - sum(kept.values())) and (words or asked["states"])


def test_half_a_character_is_a_broken_record(folder, capsys):
    chats = folder / "chats.jsonl"
    chats.write_text(chats.read_text() + '{"text": "a \\ud800 b"}\n')
    assert run(folder, "run") == 1
    assert "chats.jsonl:11: it holds half a character" in said(capsys)
    assert run(folder, "run", "data.broken=skip", "--minutes", "0") == 3


def test_a_run_that_was_refused_may_be_another_one(folder, capsys):
    """Nothing of it is left that would refuse a mended recipe."""
    assert run(folder, "run", "chunk_size=64") == 1
    assert run(folder, "run", "--minutes", "0") == 3


@pytest.fixture
def late(folder):
    """Forty records, of which one late in the run is broken, found by a run that has done some steps."""
    chats = folder / "chats.jsonl"
    good = chats.read_text().splitlines() * 4
    chats.write_text("\n".join(good) + "\n")
    shutil.copy(chats, folder / "mended.jsonl")
    chats.write_text("\n".join([*good[:27], "{never closed", *good[28:]]) + "\n")
    (folder / "recipe.toml").write_text(
        (folder / "recipe.toml").read_text().replace("chunk_size", "data.window = 4\ndata.streaming = true\nchunk_size")
    )
    return folder


LATE = ("transition.steps=12", "save_steps=1")


def test_a_late_broken_line_may_be_skipped_or_mended_and_the_run_goes_on(late, capsys):
    assert run(late, "run", *LATE) == 1
    assert "chats.jsonl:28: not JSON" in said(capsys)
    done = len(logged(late / "run"))
    assert 0 < done < 12
    shutil.copytree(late / "run", late / "other")
    assert run(late, "run", *LATE, "data.broken=skip", "--resume", "--minutes", "0") == 3
    shutil.copy(late / "mended.jsonl", late / "chats.jsonl")
    assert run(late, "other", *LATE, "--resume") == 0
    assert "has changed; what the run has read of it has not" in capsys.readouterr().err
    assert run(late, "whole", *LATE) == 0
    assert logged(late / "other") == logged(late / "whole")


def test_what_was_read_already_may_not_change(late, capsys):
    assert run(late, "run", *LATE, "--minutes", "0") == 3
    lines = (late / "chats.jsonl").read_text().splitlines()
    (late / "chats.jsonl").write_text("\n".join([lines[0].replace("Rome", "Bern"), *lines[2:], lines[1]]) + "\n")
    assert run(late, "run", *LATE, "--resume") == 1
    assert "chats.jsonl is not what the run in" in said(capsys)


def test_a_line_that_was_skipped_may_be_mended_and_stays_out_of_its_epoch(late):
    words = (*LATE, "data.broken=skip", "data.streaming=false")
    assert run(late, "whole", *words) == 0
    windows: list[dict] = []
    while not any(window["broken"] for window in windows):
        assert run(late, "run", *words, "--resume", "--minutes", "0") == 3
        windows = [json.loads(line)["state"] for line in (late / "run" / "data.jsonl").read_text().splitlines()]
    shutil.copy(late / "mended.jsonl", late / "chats.jsonl")
    assert run(late, "run", *words, "--resume", "--minutes", "0") == 3
    some = logged(late / "run")
    assert some == logged(late / "whole")[: len(some)]


def test_so_does_one_of_the_first_window(late):
    lines = (late / "mended.jsonl").read_text().splitlines()
    (late / "chats.jsonl").write_text("\n".join([lines[0], "{never closed", *lines[2:]]) + "\n")
    words = (*LATE, "data.broken=skip", "data.streaming=false", "data.window=40")
    assert run(late, "whole", *words) == 0
    assert run(late, "run", *words, "--minutes", "0") == 3
    shutil.copy(late / "mended.jsonl", late / "chats.jsonl")
    assert run(late, "run", *words, "--resume") == 0
    epoch = json.loads((late / "run" / "data.jsonl").read_text().splitlines()[1])["first"] // 4
    assert logged(late / "run")[:epoch] == logged(late / "whole")[:epoch] and epoch > 4


def test_what_was_refused_is_not_asked_again(folder, capsys):
    assert run(folder, "run", "--minutes", "0") == 3
    assert run(folder, "run", "evaluation.files=['nowhere.jsonl']", "--resume") == 1
    assert "nowhere.jsonl" in said(capsys)
    assert run(folder, "run", "--resume", "--minutes", "0") == 3
    assert run(folder, "run", "transition.steps=1", "--resume") == 1
    assert "is of step 2, and steps=1 are fewer" in said(capsys)
    assert main(["run", "--run", str(folder / "run"), "--resume"]) == 0


def test_a_run_without_a_state_leaves_no_numbers_to_the_next(folder, capsys):
    (folder / "run").mkdir()
    for name in ("losses.jsonl", "evaluations.jsonl"):
        (folder / "run" / name).write_text('{"stage": "transition", "step": 0, "loss": 7.0, "seconds": 1.0}\n')
    (folder / "run" / "wandb.id").write_text("of-a-run-of-before\n")
    assert run(folder, "run") == 0
    assert logged(folder / "run")[0]["loss"] != 7
    assert not any((folder / "run" / name).exists() for name in ("evaluations.jsonl", "wandb.id"))


def test_more_steps_another_stage_and_another_spelling_go_on_from_the_folder_alone(folder, capsys, monkeypatch):
    assert run(folder, "run") == 0
    before = logged(folder / "run")
    monkeypatch.chdir(folder)
    again = ["run", "--run", str(folder / "run"), "--resume"]
    assert main([*again, "data.files=chats.jsonl", "teacher=./teacher", "alignment.steps=3"]) == 0
    longer = logged(folder / "run")
    assert longer[: len(before)] == before and len(longer) == len(before) + 1
    further = ["further.polish.steps=2", "further.polish.learning_rate=1e-4", "further.polish.loops=[2]"]
    assert main([*again, *further]) == 0
    assert [entry["stage"] for entry in logged(folder / "run")] == ["transition"] * 2 + ["alignment"] * 3 + [
        "polish"
    ] * 2
    capsys.readouterr()
    for words, says in (
        (["transition.steps=5"], "transition.steps differ"),
        (["further.polish.learning_rate=1e-3"], "polish.learning_rate differ"),
        (["order=['alignment', 'transition', 'polish']"], "the stages that have begun differ"),
        (["further.polish.steps=1"], "steps=1 are fewer"),
        (["seed=1"], "seed differ"),
    ):
        assert main([*again, *words]) == 1
        assert says in said(capsys)
    assert main(["run", "--run", str(folder / "nowhere"), "--resume"]) == 1
    assert "nowhere holds no run of a post-training" in said(capsys)
    assert main(["run"]) == 1
    assert "name a RECIPE, or --resume --run FOLDER" in said(capsys)


def test_a_run_begins_with_a_melt_and_keeps_its_gate(folder, capsys):
    assert run(folder, "run", "gate_type=scalar") == 0
    words = ["student=" + str(folder / "run-melt"), "order=['alignment']"]
    assert run(folder, "next", *words) == 0
    begun, melt = (AutoModelForCausalLM.from_pretrained(folder / f"{name}-melt") for name in ("run", "next"))
    assert melt.config.kv_gate_type == "scalar" and melt.config.to_diff_dict() == begun.config.to_diff_dict()
    weight = "model.layers.0.mlp.up_proj.weight"
    moved = (melt.state_dict()[weight] - begun.state_dict()[weight]).abs().max()
    assert 0 < moved < 5e-3  # two steps of a rate of 1e-3 at most, from where the other run ended
    assert logged(folder / "next")[0]["kd"] < logged(folder / "run")[1]["kd"] + 1
    capsys.readouterr()
    assert run(folder, "deep", *words, "alignment.loops=[2, 9]") == 1
    assert "alignment.loops=[2, 9] is more than the max_loops=" in said(capsys)
    assert run(folder, "deep", "max_loops=3", "alignment.loops=[2, 6]") == 1
    assert "alignment.loops=[2, 6] is more than the max_loops=3 of the recipe" in said(capsys)
    assert "beginning with the MELT `run-" in " ".join((folder / "next-melt" / "README.md").read_text().split())


def test_an_ouros_published_config_can_be_planned_and_tried(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_OURO))
    words = [f"teacher={tmp_path}", "data.files=-", "output=-", "dtype=float32"]
    assert main(["cost", "melt-1.6b", *words, "--scale", "64"]) == 0


def test_steps_without_a_finite_gradient_change_nothing_and_are_counted(folder, monkeypatch):
    """One batch of the run gives a loss that is no number."""
    from melt_serve.train.distil import phase

    original = phase.phase_losses

    def broken(stage, step, *rest):
        parts = original(stage, step, *rest)
        return {part: value * math.nan for part, value in parts.items()} if step == 1 and stage.interpolate else parts

    monkeypatch.setattr(phase, "phase_losses", broken)
    assert run(folder, "strict", "transition.steps=4") == 1
    assert run(folder, "run", "transition.steps=4", "most_skipped=0.25", "save_steps=1", "keep_last=4") == 0
    entries = read_log(folder / "run" / "losses.jsonl")
    assert [entry["step"] for entry in entries if "skipped" in entry] == [1] and "kd" not in entries[1]
    states = [
        torch.load(folder / "run" / "states" / f"transition-{n:06}.state.pt", weights_only=True) for n in (1, 2, 3)
    ]
    one, two, three = (state["model"]["model.layers.0.mlp.up_proj.weight"] for state in states)
    assert torch.equal(one, two) and not torch.equal(two, three) and three.isfinite().all()


def test_the_last_states_and_every_nth_are_kept(folder):
    assert run(folder, "run", "transition.steps=7", "save_steps=1", "keep_last=2", "keep_every=3") == 0
    kept = sorted(path.name for path in (folder / "run" / "states").iterdir())
    numbers = [int(name[-15:-9]) for name in kept if name.startswith("transition")]
    assert numbers == [3, 6, 7] and os.path.getsize(folder / "run" / "states" / kept[-1]) > 0


def test_answers_end_where_the_template_ends_them_whatever_the_teachers_files_say(folder):
    """Ouro's name `<|endoftext|>`; turns end with `<|im_end|>`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token == "<|im_end|>"
    for name, changes in (("tokenizer_config", {"eos_token": "<|im_start|>"}), ("config", {"eos_token_id": other})):
        path = folder / "teacher" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (folder / "teacher" / "generation_config.json").unlink()
    assert run(folder, "run", "order=['alignment']") == 0
    stated = json.loads((folder / "run-melt" / "generation_config.json").read_text())["eos_token_id"]
    assert stated == [other, end]
