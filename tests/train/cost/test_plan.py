"""What a post-training takes: the arithmetic, held against what really is counted."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from melt_serve.capacity import shape_of
from melt_serve.modeling import LoopLMConfig
from melt_serve.train.__main__ import main
from melt_serve.train.cost import probe
from melt_serve.train.cost.arithmetic import memory, sequence_flops
from melt_serve.train.cost.plan import to_be_planned
from melt_serve.train.cost.probe import kept_bytes, kept_for_backward, random_step, reduced
from melt_serve.train.distil.build import student_config
from melt_serve.train.recipe_files import load_recipe
from tests.ouro_files import CONFIG
from tests.tiny_models import SHAPE

OWN = ["teacher=ouro-1.4b", "data.files=-", "output=-", "dtype=float32"]
TEACHER = LoopLMConfig(**{**SHAPE, "num_hidden_layers": 3, "num_key_value_heads": 4, "vocab_size": 512})


BASES = [{"train_base": "full"}, {"train_base": "frozen"}, {"train_base": "lora", "lora_rank": 8}]


def small(**changes):
    recipe = replace(load_recipe("melt-1.6b", OWN), chunk_size=8, sequence_length=40, batch_tokens=80)
    return replace(recipe, **changes)


@pytest.mark.parametrize(("stage", "recomputed"), [("transition", True), ("alignment", False)])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base["train_base"])
def test_the_arithmetic_is_that_of_real_steps(stage, recomputed, base):
    recipe = small(checkpoint_chunks=recomputed, **base)
    student, loss = random_step(TEACHER, recipe, recipe.stages[stage])
    student.checkpoint_chunks = recomputed
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    expected = sequence_flops(student_config(recipe, TEACHER), recipe, recipe.stages[stage])
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)


def test_two_passes_are_counted_twice_and_kept_twice():
    recipe = small(decode_mode="token", checkpoint_chunks=False)
    once = recipe.alignment
    twice = replace(once, decode_aware_from=0.0, decode_aware_share=1.0)
    _, loss = random_step(TEACHER, recipe, twice)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    expected = sequence_flops(student_config(recipe, TEACHER), recipe, twice)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)
    assert expected > 1.3 * sequence_flops(student_config(recipe, TEACHER), recipe, once)
    assert kept_for_backward(TEACHER, recipe, twice, 2) > 1.5 * kept_for_backward(TEACHER, recipe, once, 2)


def test_the_rate_is_that_of_the_steps_that_were_taken(monkeypatch):
    """Of a stage that runs half of its batches twice, steps that always do are measured."""
    recipe = small(decode_mode="token")
    half = replace(recipe.alignment, decode_aware_from=0.0, decode_aware_share=0.5)
    monkeypatch.setattr(probe, "median", lambda seconds: 1.0)
    expected = sequence_flops(student_config(recipe, TEACHER), recipe, replace(half, decode_aware_share=1.0))
    assert probe.measured_rate(TEACHER, recipe, half) == recipe.micro_batch * expected


def test_where_c_is_drawn_what_the_largest_keeps_is_counted():
    recipe = small(checkpoint_chunks=False)
    drawn = replace(recipe, alignment=replace(recipe.alignment, chunk_sizes=(16, 8, 4)))
    largest = replace(recipe, chunk_size=16)
    for stage in (drawn.alignment, replace(drawn.alignment, chunk_sizes=(4,))):
        kept = kept_for_backward(TEACHER, replace(drawn, alignment=stage), stage, 2)
        assert kept == kept_for_backward(TEACHER, largest if 16 in stage.chunk_sizes else recipe, recipe.alignment, 2)


@pytest.mark.parametrize("stage", ["transition", "alignment"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base["train_base"])
def test_bytes_kept_are_those_counted_at_the_true_shape(stage, base):
    """Extrapolated from an eighth and a quarter of the width, two layers and three chunks."""
    recipe = small(checkpoint_chunks=False, **base)
    wide = LoopLMConfig(**{**TEACHER.to_dict(), "hidden_size": 128, "intermediate_size": 192, "head_dim": 32})
    student, loss = random_step(wide, recipe, recipe.stages[stage])
    with kept_bytes(student) as counts:
        loss()
    assert kept_for_backward(wide, recipe, recipe.stages[stage], 2) == pytest.approx(counts[-1], rel=0.1)
    last = counts[-1] - counts[-2]
    recomputed = replace(recipe, checkpoint_chunks=True)
    assert kept_for_backward(wide, recomputed, recomputed.stages[stage], 2) == pytest.approx(last, rel=0.1)


def test_phase_1_keeps_rows_of_every_loop_and_more_devices_share_the_states():
    teacher, recipe = shape_of("ouro-1.4b"), load_recipe("melt-1.6b", [*OWN, "dtype=bfloat16"])
    transition, alignment = (memory(teacher, recipe, stage, 1, 0.0) for stage in recipe.stages.values())
    per_loop = "phase 1's rows per loop and gradients"
    assert transition["final rows and gradients"] == 2 * 10_000 * 196_608
    assert transition[per_loop] == 4 * transition["final rows and gradients"] and alignment[per_loop] == 0
    assert alignment["teacher's attention outputs"] == 4 * 24 * 10_000 * 2048 * 2
    assert transition["teacher"] == pytest.approx(2.87e9, rel=0.01)
    eight = memory(teacher, recipe, recipe.transition, 8, 0.0)
    assert eight["optimizer states"] == pytest.approx(transition["optimizer states"] / 8)
    assert eight["teacher"] == transition["teacher"]


def test_the_base_that_is_the_teachers_lies_on_the_device_once_and_has_no_states():
    teacher, recipe = shape_of("ouro-1.4b"), load_recipe("melt-1.6b", [*OWN, "dtype=bfloat16"])
    full, frozen, lora = (
        memory(teacher, replace(recipe, **base), recipe.alignment, 1, 0.0)
        for base in (*BASES[:2], {"train_base": "lora", "lora_rank": 16})
    )
    gates = 24 * (2 * 2048**2 + 3 * 2048) + 2048 + 1  # W_z, U_z, a b_z for loops 2 to 4, and the exit gate
    adapters = 24 * 4 * 16 * 2 * 2048
    assert frozen["optimizer states"] == 8 * gates and lora["optimizer states"] == 8 * (gates + adapters)
    assert full["optimizer states"] > 8 * frozen["optimizer states"] - 8 * gates
    assert frozen["teacher"] == full["teacher"] and frozen["gradient of the head"] == 0


def test_cost_of_a_device_says_hours_and_what_fits_for_each_way_to_train_the_base(capsys):
    torch.set_num_threads(1)
    words = ["melt-1.6b", "chunk_size=16", "sequence_length=1600", "batch_tokens=320000", "--device", "h100"]
    assert main(["cost", *words, "--scale", "64", "--share", "0.25"]) == 0
    said = capsys.readouterr().out
    lines = {line[:20].split("  ")[0].split(",")[0]: line.split() for line in said.splitlines()}
    full, frozen, lora = (float(each.replace(",", "")) for each in lines["H100-hours"][1:])
    assert frozen <= lora < full
    recipe, teacher = to_be_planned("melt-1.6b", words[1:4])
    flops = sum(
        stage.steps * recipe.sequences * sequence_flops(student_config(recipe, teacher), recipe, stage)
        for stage in recipe.stages.values()
    )
    assert full == pytest.approx(flops / 989e12 / 0.25 / 3600, rel=0.01)
    assert "1,040 H100-hours" in said and "rank 16" in said
    assert "longest on 24 GB" in said and "longest on 80 GB" in said


def test_cost_prints_steps_tokens_memory_and_time(capsys):
    torch.set_num_threads(1)
    words = ["melt-1.6b", "chunk_size=16", "dtype=float32", "--scale", "64", "--processes", "8"]
    assert main(["cost", *words]) == 0
    said = capsys.readouterr().out
    for part in ("160,000,000", "96,000,000", "256,000,000", "hours", "optimizer states", "phase 1's rows", "1/64"):
        assert part in said


def test_a_teacher_as_ouros_are_published_is_planned(tmp_path):
    """Its config names a type for each layer."""
    facts = {**CONFIG, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    recipe, teacher = to_be_planned("melt-1.6b", [f"teacher={tmp_path}"])
    for scale in (1, 2, 16):
        smaller, _ = reduced(teacher, recipe, scale)
        assert (smaller.num_hidden_layers, smaller.num_attention_heads) == (2, 2 // math.gcd(2, scale))


def test_what_cannot_be_planned_is_one_line(capsys):
    for words, says in ((["demo"], "bundled kind"), (["melt-1.6b", "teacher=./none"], "none does not exist")):
        assert main(["cost", *words]) == 1
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert main(["cost", "melt-1.6b", "dtype=float32", "--device", "h100"]) == 1
    said = capsys.readouterr().err
    assert "dtype=float32: the peaks of devices are those of bfloat16; set dtype=bfloat16" in said
    for words in (["--scale", "0"], ["--processes", "0"], ["--device", "tpu"], ["--share", "2"]):
        with pytest.raises(SystemExit, match="2"):
            main(["cost", "melt-1.6b", *words])
