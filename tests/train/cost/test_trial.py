"""Some steps of each phase with random weights: what is reported is what ran, in as many sessions as it took."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch

from melt_serve.capacity import shape_of
from melt_serve.device import name_of
from melt_serve.train.__main__ import main
from melt_serve.train.cost.arithmetic import sequence_flops
from melt_serve.train.cost.probe import reduced
from melt_serve.train.distil.build import student_config
from melt_serve.train.loop import trainer
from melt_serve.train.recipe_files import load_recipe

TINY = ["chunk_size=8", "sequence_length=16", "--scale", "64"]


def trial(rows, *words):
    return main(["trial", *TINY, *words, "--rows", str(rows)])


def read(rows):
    return [json.loads(line) for line in rows.read_text().splitlines()]


def test_rates_are_those_of_the_steps_and_their_counted_arithmetic(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing is to be saved of a trial that is not cut")

    monkeypatch.setattr(trainer, "save_state", refuse)
    rows = tmp_path / "rows.jsonl"
    assert trial(rows, "dtype=float32", "--steps", "3") == 0
    said = capsys.readouterr().out
    device = name_of(torch.device("cpu"))
    assert f"device: {device}, size: reduced by 64 (width 32, 2 layers, 512 words, 16 tokens a sequence)" in said
    assert "batch_tokens=32 (the recipe: 320,000)" in said

    own = ["teacher=ouro-1.4b", "data.files=-", "output=-", "chunk_size=8", "sequence_length=16", "batch_tokens=32"]
    teacher, recipe = reduced(shape_of("ouro-1.4b"), load_recipe("melt-1.6b", own), 64)
    student = student_config(recipe, teacher)
    for row, (name, stage) in zip(read(rows), recipe.stages.items(), strict=True):
        assert row["phase"] == name and name in said and "2 of 3" in said
        assert len(row["seconds"]) == 2 and row["steps"] == 3
        assert row["tokens_per_second"] == pytest.approx(32 / median(row["seconds"]))
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        again = sequence_flops(student, recipe, stage) / 16
        once = sequence_flops(student, replace(recipe, checkpoint_chunks=False), stage) / 16
        assert row["flops_per_token_with_repeats"] == pytest.approx(again)
        assert row["flops_per_token"] == pytest.approx(once) and once < again
        assert row["share"] == pytest.approx(row["tokens_per_second"] * once / row["matmul_rate"])
        assert 1e8 < row["peak_memory"] < 1e11
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_trial_goes_on_after_a_sitting_and_what_is_measured_is_not_measured_again(tmp_path, capsys):
    """In bfloat16, so the state is gathered from FSDP and shared out again."""
    rows = tmp_path / "rows.jsonl"
    assert trial(rows, "--steps", "3", "--minutes", "0") == 3
    assert "the same command goes on" in capsys.readouterr().err and not rows.exists()
    assert trial(rows, "--steps", "3") == 0
    said = capsys.readouterr().out
    assert [(row["sessions"], row["steps"], len(row["seconds"])) for row in read(rows)] == [(2, 3, 1), (1, 3, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    before = rows.read_bytes()
    assert trial(rows, "--steps", "3", "--minutes", "0") == 0
    assert rows.read_bytes() == before and capsys.readouterr().out == said


def test_steps_that_all_warmed_up_measure_nothing(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    words = ["dtype=float32", "--steps", "2", "--minutes", "0"]
    assert [trial(rows, *words) for _ in range(3)] == [3, 3, 1]
    assert "each of its 2 steps was the first of a session" in capsys.readouterr().err
    assert not rows.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo"], "bundled kind"),
        (["nothing"], "there is no recipe nothing"),
        (["chunk_size=many"], "chunk_size='many'"),
        (["melt-1.6b", "batch_tokens=100"], "batch_tokens=100 is not a multiple"),
        (["melt-1.6b", "teacher=./none"], "is no checkpoint"),
    ],
)
def test_what_cannot_be_tried_is_one_line(words, says, tmp_path, capsys):
    assert main(["trial", *words, "--rows", str(tmp_path / "rows.jsonl")]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [["--steps", "1"], ["--scale", "0"], ["--minutes", "-1"]])
def test_flags_say_what_they_take(words):
    with pytest.raises(SystemExit, match="2"):
        main(["trial", *words])
