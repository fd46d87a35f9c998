"""Compiled layers: the same losses, from one graph for all layers."""

import torch
from torch._dynamo.utils import counters

from melt_serve.train.__main__ import main
from tests.train.tiny_run import assert_close, logged, prepare

# At alpha 0 the gradient is rounding alone, which AdamW makes a step of: without mixed rows.
WORDS = ["checkpoint_chunks=true", "transition.interpolate=false", "transition.steps=2", "alignment.steps=1"]


def test_compiled_layers_have_the_losses_of_those_that_are_not(tmp_path):
    recipe = prepare(tmp_path)
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        counters.clear()
        run, output = tmp_path / compiled, tmp_path / f"{compiled}-melt"
        assert main(["run", str(recipe), "--run", str(run), f"output={output}", f"compile={compiled}", *WORDS]) == 0
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == (2 if compiled == "true" else 0)  # with gradients and without
    assert_close(logged(tmp_path / "true"), logged(tmp_path / "false"))


def test_without_a_compiler_there_is_one_line(tmp_path, monkeypatch, capsys):
    recipe = prepare(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    capsys.readouterr()
    assert main(["run", str(recipe), "--run", str(tmp_path / "run"), "compile=true"]) == 1
    said = capsys.readouterr().err
    assert "compile=true needs a C++ compiler" in said and "Traceback" not in said
