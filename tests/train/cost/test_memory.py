"""The memory of a step: what is counted, and that the plan says the same."""

import json

import pytest
import torch

from melt_serve.train.__main__ import main
from melt_serve.train.cost.step_memory import PHASE_1, PHASE_2, WITHOUT, LiveBytes

WORDS = ("melt-1.6b", "chunk_size=8", "dtype=float32", "transition.loops=[2]", "--scale", "64")


def test_a_storage_is_counted_once_and_until_nobody_has_it():
    outside = torch.ones(1000)
    with LiveBytes() as counted:
        doubled = outside * 2
        view = doubled[10:].view(9, 110)
        assert counted.now == 4000
        (doubled + 1).sum()
        assert (counted.now, counted.most) == (4000, 8004)
        del doubled
        assert counted.now == 4000
        del view
        assert counted.now == 0 and counted.most == 8004


def test_what_the_backward_pass_needs_is_counted():
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as counted:
        loss = (weight.exp() * 2).sum()
        assert counted.now == 4004
        loss.backward()
        assert counted.most >= 8004
        assert counted.now == 4004  # the gradient, and the loss


def test_peaks_are_those_planned_and_phase_1_keeps_rows_of_every_loop(tmp_path, capsys):
    torch.set_num_threads(1)
    report = tmp_path / "memory.md"
    assert main(["memory", *WORDS, "--lengths", "32,64", "--loops", "2", "--report", str(report)]) == 0
    said = capsys.readouterr().out
    steps = {
        (each["variant"], each["checkpoint_chunks"], each["length"], each["loops"]): each
        for each in json.loads((tmp_path / "memory.json").read_text())
    }
    assert len(steps) == 2 * 2 * 3
    for (_, recomputed, _, _), step in steps.items():
        assert step["planned"] == pytest.approx(step["peak"], rel=0.3 if recomputed else 0.15), step
    for variant in (PHASE_1, PHASE_2, WITHOUT):
        for length in (32, 64):
            assert steps[variant, True, length, 2]["peak"] < steps[variant, False, length, 2]["peak"]
    rows = [steps[PHASE_1, True, at, 2]["peak"] - steps[WITHOUT, True, at, 2]["peak"] for at in (32, 64)]
    assert rows[0] > 0 and rows[1] / rows[0] == pytest.approx(2, rel=0.3)
    text = report.read_text()
    assert "1/64" in text and "memory.svg" in text and all(line in text for line in said.splitlines() if "|" in line)
    assert (tmp_path / "memory.svg").stat().st_size > 10_000


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    for words, says in (
        (["demo"], "bundled kind"),
        ([*WORDS, "--report", str(tmp_path / "none" / "memory.md")], "a folder that is there"),
        ([*WORDS, "--report", str(tmp_path / "memory.txt")], "ends in .md"),
    ):
        assert main(["memory", *words]) == 1
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    for words in (["--scale", "0"], ["--lengths", "0"], ["--loops", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(["memory", *WORDS, *words])
