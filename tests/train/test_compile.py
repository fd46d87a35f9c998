"""Compiled layers: the same losses, from one graph for all layers."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from melt_serve.train.__main__ import main
from tests.train.tiny_run import assert_close, logged, prepare

# At alpha 0 the gradient is rounding alone, which AdamW makes a step of: without mixed rows.
WORDS = ["checkpoint_chunks=true", "transition.interpolate=false", "transition.steps=2", "alignment.steps=1"]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
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
