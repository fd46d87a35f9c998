"""The bundled checkpoints: the pipeline that makes them, on tiny models, and what is bundled."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.__main__ import main
from melt_serve.train.bundled_run import fresh_student, make_checkpoints, plain
from melt_serve.train.loop.trainer import LOG
from melt_serve.train.recipe import Recipe, Shape
from melt_serve.train.session import Paused, Session, TrainingError
from melt_serve.train.stages import Distillation, Pretraining
from tests.train.tiny_run import TIMED

RATE = {"learning_rate": 1e-3, "batch": 8, "warmup": 2}
TINY = Recipe(
    shape=Shape(hidden_size=32, intermediate_size=64, heads=2, max_loops=5),
    gate_start=-2.0,  # so far away that a few steps come nearer
    teacher=Pretraining(steps=30, **RATE),
    shallow=Pretraining(steps=2, **RATE),
    transition=Distillation(steps=8, interpolate=True, decay_from=1.0, **RATE),
    alignment=Distillation(steps=16, loops=(2, 4), alignment=0.1, distance="sum", decode_aware_from=0.5, **RATE),
    exits=Distillation(steps=16, decode_aware_from=0.5, loop_price=0.5, gate_learning_rate=0.1, **RATE),
)


def logged(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, make_checkpoints(TINY, folder / "run", folder / "out", Session(), 4)


def test_every_stage_lowers_its_loss(made):
    folder, _ = made
    by_stage = {}
    for line in logged(folder / "run"):
        by_stage.setdefault(line["stage"], []).append(line)
    assert {name: len(lines) for name, lines in by_stage.items()} == {
        "teacher": 30,
        "shallow": 2,
        "transition": 8,
        "alignment": 16,
        "exits": 16,
    }
    for name, parts in (("teacher", ["loss"]), ("alignment", ["kd", "attention"])):
        for part in parts:
            losses = [line[part] for line in by_stage[name]]
            assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), (name, part)
    transition = [line["loss"] for line in by_stage["transition"]]
    assert transition[0] < 1e-6 < 1e-3 < transition[1]  # at alpha 0 the student is the teacher
    for line in by_stage["alignment"]:
        assert line["loss"] == pytest.approx(line["kd"] + 0.1 * line["attention"])
    left = [line for line in by_stage["exits"] if "loops" in line]
    assert 4 <= len(left) <= 12
    for line in left:
        assert line["loss"] == pytest.approx(line["kd"] + 0.5 * line["loops"]) and 1 <= line["loops"] <= 4
    assert left[-1]["loops"] < 0.9 * left[0]["loops"]


def test_what_is_written_is_what_transformers_loads(made):
    folder, scores = made
    teacher = AutoModelForCausalLM.from_pretrained(folder / "out" / "looplm-demo")
    melt = AutoModelForCausalLM.from_pretrained(folder / "out" / "melt-demo")
    assert type(teacher) is OuroForCausalLM and type(melt) is MeltForCausalLM
    assert melt.config.architectures == ["MeltForCausalLM"] and melt.config.model_type == "melt"
    assert len(AutoTokenizer.from_pretrained(folder / "out" / "melt-demo")) <= melt.config.vocab_size
    card = (folder / "out" / "melt-demo" / "README.md").read_text()
    assert all(f"| {score.checkpoint} | {score.loops} |" in card for score in scores)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["looplm-demo", "melt-demo"]


def test_a_looplm_that_is_there_is_kept_and_only_its_melt_is_made(made, tmp_path, capsys):
    teacher = made[0] / "out" / "looplm-demo"
    short = {name: replace(getattr(TINY, name), steps=1) for name in ("transition", "alignment", "exits")}
    recipe = replace(TINY, gate_start="mean", **short)
    scores = make_checkpoints(recipe, tmp_path / "run", tmp_path / "out", Session(), 4, str(teacher))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["melt-demo"]
    assert [line["stage"] for line in logged(tmp_path / "run")] == ["transition", "alignment", "exits"]
    assert {score.checkpoint for score in scores} == {"looplm-demo", "converted", "melt-demo"}
    card = (tmp_path / "out" / "melt-demo" / "README.md").read_text()
    assert "bundled --teacher " in card and "shallow" not in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "melt-demo").config.kv_gate_bias == "loop"
    for another in (str(LOOPLM), None):
        with pytest.raises(TrainingError, match=r"is not what the run in .* was begun with"):
            make_checkpoints(recipe, tmp_path / "run", tmp_path / "out", Session(), 4, another)
    words = ["bundled", "--run", str(tmp_path / "another"), "--teacher"]
    capsys.readouterr()
    for wrong, says in ((MELT, "is a MELT checkpoint already"), (tmp_path / "none", "does not exist")):
        assert main([*words, str(wrong)]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_many_sessions_make_the_same_checkpoints_bit_for_bit(made, tmp_path):
    folder, scores = made
    sessions = 0
    while True:
        try:
            again = make_checkpoints(TINY, tmp_path / "run", tmp_path / "out", Session(minutes=0.02), 4)
            break
        except Paused:
            sessions += 1
            assert not (tmp_path / "out").exists()
    assert sessions > 1 and again == scores
    for name in ("looplm-demo", "melt-demo"):
        weights = [(place / name / "model.safetensors").read_bytes() for place in (folder / "out", tmp_path / "out")]
        assert weights[0] == weights[1]
    strip = [[{**line, **dict.fromkeys(TIMED)} for line in logged(place / "run")] for place in (folder, tmp_path)]
    assert strip[0] == strip[1]


def test_a_fresh_student_is_the_teacher_with_a_gate():
    teacher = AutoModelForCausalLM.from_pretrained(LOOPLM)
    student = fresh_student(teacher, replace(Recipe(), shape=Shape()))
    assert all(torch.equal(weight, student.state_dict()[key]) for key, weight in teacher.state_dict().items())
    assert all("kv_gate" in key for key in student.state_dict().keys() - teacher.state_dict().keys())
    assert type(plain(student)) is MeltForCausalLM


def test_the_bundled_checkpoints_are_small_and_whole():
    for path in (LOOPLM, MELT):
        names = {file.name for file in path.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert sum(file.stat().st_size for path in (LOOPLM, MELT) for file in path.iterdir()) < 16 << 20


def test_a_session_ends_saves_and_says_how_to_go_on(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["bundled", "--run", str(run), "--out", str(out), "--minutes", "0"]
    assert main(words) == 3
    go_on = f"paused, everything is saved; go on with: python -m melt_serve.train bundled --resume --run {run}\n"
    assert capsys.readouterr().err.endswith(go_on)
    assert len(logged(run)) == 1 and not out.exists()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"melt_serve.train: error: {run} holds a run already") and said.count("\n") == 1
    assert main([*words, "--resume"]) == 3 and len(logged(run)) == 2


def test_help_teaches_and_bad_words_are_one_error(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bundled", "--help"])
    assert "--resume" in capsys.readouterr().out
    for words in (["--seed", "x"], ["--questions", "0"], ["--minutes", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["bundled", *words])
        assert f"error: argument {words[0]}: " in capsys.readouterr().err
