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


def trial(records, *words):
    return main(["trial", *TINY, *words, "--records", str(records)])


def read(records):
    return [json.loads(line) for line in records.read_text().splitlines()]


def test_rates_are_those_of_the_steps_and_their_counted_arithmetic(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing is to be saved of a trial that is not cut")

    monkeypatch.setattr(trainer, "save_state", refuse)
    records = tmp_path / "records.jsonl"
    assert trial(records, "dtype=float32", "--steps", "3") == 0
    said = capsys.readouterr().out
    device = name_of(torch.device("cpu"))
    assert f"device: {device}, size: reduced by 64 (width 32, 2 layers, 512 words, 16 tokens a sequence)" in said
    assert "batch_tokens=32 (the recipe: 320,000)" in said

    own = ["teacher=ouro-1.4b", "data.files=-", "output=-", "chunk_size=8", "sequence_length=16", "batch_tokens=32"]
    teacher, recipe = reduced(shape_of("ouro-1.4b"), load_recipe("melt-1.6b", own), 64)
    student = student_config(recipe, teacher)
    for record, (name, stage) in zip(read(records), recipe.stages.items(), strict=True):
        assert record["phase"] == name and name in said and "2 of 3" in said
        assert len(record["seconds"]) == 2 and record["steps"] == 3
        assert record["tokens_per_second"] == pytest.approx(32 / median(record["seconds"]))
        assert record["slowest"] <= record["tokens_per_second"] <= record["fastest"]
        recomputed = sequence_flops(student, recipe, stage) / 16
        once = sequence_flops(student, replace(recipe, checkpoint_chunks=False), stage) / 16
        assert record["flops_per_token_with_repeats"] == pytest.approx(recomputed)
        assert record["flops_per_token"] == pytest.approx(once) and once < recomputed
        assert record["share"] == pytest.approx(record["tokens_per_second"] * once / record["matmul_rate"])
        assert 1e8 < record["peak_memory"] < 1e11
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_trial_goes_on_after_a_session_and_what_is_measured_is_not_measured_again(tmp_path, capsys):
    """In bfloat16, so the state is gathered from FSDP and shared out again."""
    records = tmp_path / "records.jsonl"
    assert trial(records, "--steps", "3", "--minutes", "0") == 3
    assert "the same command goes on" in capsys.readouterr().err and not records.exists()
    assert trial(records, "--steps", "3") == 0
    said = capsys.readouterr().out
    assert [(record["sessions"], record["steps"], len(record["seconds"])) for record in read(records)] == [
        (2, 3, 1),
        (1, 3, 2),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    before = records.read_bytes()
    assert trial(records, "--steps", "3", "--minutes", "0") == 0
    assert records.read_bytes() == before and capsys.readouterr().out == said


def test_steps_that_all_warmed_up_measure_nothing(tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    words = ["dtype=float32", "--steps", "2", "--minutes", "0"]
    assert [trial(records, *words) for _ in range(3)] == [3, 3, 1]
    assert "each of its 2 steps was the first of a session" in capsys.readouterr().err
    assert not records.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo"], "bundled kind"),
        (["nothing"], "there is no recipe nothing"),
        (["chunk_size=many"], "chunk_size='many'"),
        (["melt-1.6b", "batch_tokens=100"], "batch_tokens=100 is not a multiple"),
        (["melt-1.6b", "teacher=./none"], "does not exist"),
    ],
)
def test_what_cannot_be_tried_is_one_line(words, says, tmp_path, capsys):
    assert main(["trial", *words, "--records", str(tmp_path / "records.jsonl")]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [["--steps", "1"], ["--scale", "0"], ["--minutes", "-1"]])
def test_flags_say_what_they_take(words):
    with pytest.raises(SystemExit, match="2"):
        main(["trial", *words])
