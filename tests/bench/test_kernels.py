"""`melt-serve bench kernels` on a CPU, tiny. How fast anything is is not for a test to say."""

import json
import math
from dataclasses import replace

import pytest
import torch

from melt_serve import cli
from melt_serve.bench.kernels import Measured, table
from melt_serve.bench.operators import Part
from melt_serve.bench.shapes import shape
from melt_serve.config import MeltConfig, weight_shapes
from melt_serve.device import Rates

TINY = "--device cpu --tokens 32 --batch 2 --context 20 --train-tokens 16 --rounds 2 --no-compile".split()
D, TOKENS, TRAINED, LOOPS = 256, 32, 16, 4


def multiply_adds(config, loops):
    """Of a token, with weights, in all loops; the gate from the second on, the head after every loop."""
    shapes = {name: math.prod(size) for name, size in weight_shapes(config) if name.endswith("weight")}
    layers = sum(count for name, count in shapes.items() if "_proj" in name and "kv_gate" not in name)
    gates = sum(count for name, count in shapes.items() if "kv_gate" in name)
    return loops * (layers + shapes["lm_head.weight"]), (loops - 1) * gates


def test_bytes_and_operations_are_counted_and_held_against_the_devices_rates(capsys, tmp_path):
    plot = tmp_path / "kernels.svg"
    assert cli.main(["bench", "kernels", *TINY, "--json", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    measured = json.loads(output.splitlines()[-1])
    rates = measured["rates"]
    assert rates["copy"] > 0 and rates["matmul"] > 0 and measured["judged"] is False
    gate, gradient, rows = measured["parts"]
    state = 2 * TOKENS * D
    assert [each["name"] for each in measured["parts"]] == ["gate", "gate and gradient", "RoPE and rows"]
    assert gate["bytes"] == 5 * state + 2 * D and gate["operations"] == 10 * TOKENS * D
    assert gradient["bytes"] == 14 * state
    assert rows["bytes"] == 6 * state + 2 * TOKENS * 64 + 16 * TOKENS and rows["operations"] == 6 * TOKENS * D
    for each in measured["parts"]:
        assert each["seconds"]["triton"] is None and each["goal"] is None
        assert each["share"] == pytest.approx(each["bytes"] / each["seconds"]["eager"] / rates["copy"])
    assert len(measured["layer_ratios"]) == 2 and min(measured["layer_ratios"]) > 0
    # The teacher's forward; the student's, and its backward, which is twice as much. Attention adds a little, but on a
    # CPU, where PyTorch does not count it.
    shared, gates = multiply_adds(MeltConfig(**shape("small")), LOOPS)
    weights = 2 * TRAINED * (4 * shared + 3 * gates)
    assert weights <= measured["training_operations"] < 1.15 * weights
    share = measured["training_operations"] / measured["training_seconds"] / rates["matmul"]
    assert measured["training_share"] == pytest.approx(share)
    assert "of copy bandwidth" in output and "reached" not in output and "<svg" in plot.read_text()


def test_goals_are_judged_where_they_are_meant():
    part = Part("gate", 16384, 10, 10, {"eager": 3e-6, "compile": 2e-6, "triton": 1e-6}, 0.81, 0.8)
    rates = Rates("NVIDIA H200", 4e12, 8e14)
    good = Measured(rates, "melt-1.6b", [part], {"melt": 1.1, "looplm": 1.0}, [1.1, 1.2, 1.0], 1.0, 1, 0.4, True)
    text = table(good)
    assert "0.80 reached" in text and "1.15 reached" in text and "0.35 reached" in text
    slow = replace(good, parts=[replace(part, share=0.7)], layer_ratios=[1.2], training_share=0.3)
    text = table(slow)
    assert "0.80 missed" in text and "1.15 missed" in text and "0.35 missed" in text
    assert "reached" not in table(replace(good, parts=[replace(part, goal=None)], judged=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", ["kernels", "reference"])
def test_without_a_gpu_asking_for_one_is_one_line(bench, capsys):
    assert cli.main(["bench", bench, "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "melt-serve: error: --device=cuda: PyTorch finds no GPU here\n"


def test_a_choice_of_kernels_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("MELT_KERNELS", "reference")
    assert cli.main(["bench", "kernels", *TINY]) == 1
    assert "MELT_KERNELS=reference: every version is measured here; unset it" in capsys.readouterr().err
