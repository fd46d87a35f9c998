"""Recipes in files: the bundled ones say what they should, and a wrong word is one line that names it."""

from dataclasses import replace

import pytest

from melt_serve.train.recipe import Data, PostTraining, Recipe
from melt_serve.train.recipe_files import RecipeError, bundled_recipes, load_recipe
from melt_serve.train.stages import Distillation

OWN = ("teacher=./ouro", "data.files=chats.jsonl", "output=./melt")


def test_demo_is_the_bundled_recipe():
    assert load_recipe("demo") == Recipe()
    assert load_recipe("demo", ["seed=3", "output=./mine"]) == replace(Recipe().seeded(3), output="./mine")


@pytest.mark.parametrize("name", ["melt-1.6b", "melt-1.6b-paper"])
def test_melt_16b_has_the_papers_data_lengths_and_rates(name):
    recipe = load_recipe(name, OWN)
    assert isinstance(recipe, PostTraining) and recipe.data == Data(("chats.jsonl",))
    assert (recipe.chunk_size, recipe.sequence_length, recipe.batch_tokens, recipe.sequences) == (
        512,
        10000,
        320000,
        32,
    )
    transition, alignment = recipe.stages.values()
    assert list(recipe.stages) == ["transition", "alignment"]
    for stage, steps in ((transition, 500), (alignment, 300)):
        assert stage.steps == steps and stage.loops == (4,) and stage.batch == 32
        assert (stage.learning_rate, stage.gate_learning_rate) == (8e-6, 5e-4)
        assert stage.decode_aware_from == 1.0
    assert transition.interpolate and not transition.alignment
    assert not alignment.interpolate


def test_melt_16b_is_how_a_new_recipe_starts_and_its_papers_twin_is_the_formula_to_the_letter():
    ours, papers = (load_recipe(name, OWN) for name in ("melt-1.6b", "melt-1.6b-paper"))
    assert (ours.gate_start, ours.decode_mode, ours.alignment.distance) == ("mean", "chunk", "relative")
    changed = {"gate_start": -2.0, "decode_mode": "token"}
    stage = replace(ours.alignment, alignment=0.1, distance="sum")
    assert papers == replace(ours, **changed, alignment=stage)
    words = ["kind=post-training", *OWN, "transition.steps=1", "transition.learning_rate=1"]
    words += ["alignment.steps=1", "alignment.learning_rate=1"]
    plain = load_recipe("melt-1.6b", words)
    assert (plain.gate_start, plain.decode_mode, plain.alignment.distance) == ("mean", "chunk", "relative")


def test_words_on_the_command_line_change_any_field():
    words = ["chunk_size=500", "data.files=['a.jsonl', 'b.jsonl']", "transition.loops=[2, 4]", "exits.steps=5"]
    recipe = load_recipe("melt-1.6b", [*OWN, *words, "exits.learning_rate=1e-5"])
    assert recipe.chunk_size == 500 and recipe.data.files == ("a.jsonl", "b.jsonl")
    assert recipe.transition.loops == (2, 4) and recipe.alignment.loops == (4,)
    assert recipe.exits == Distillation(steps=5, learning_rate=1e-5)


def test_a_file_of_ones_own_is_a_recipe_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('kind = "bundled"\n[teacher]\nsteps = 7\nlearning_rate = 0.1\n')
    assert load_recipe(str(path)).teacher.steps == 7


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "teacher is missing; give it in the file, or as teacher=VALUE"),
        ([], "data.files is missing; give it in the file, or as data.files=VALUE"),
        ([*OWN, "transition.stepps=3"], "there is no field transition.stepps; did you mean steps?"),
        ([*OWN, "data.zzz=3"], "there is no field data.zzz; use files"),
        ([*OWN, "transition.steps=0"], "transition.steps=0: input should be greater than or equal to 1"),
        ([*OWN, "transition.learning_rate=fast"], "transition.learning_rate='fast': input should be a valid number"),
        ([*OWN, "gate_rank=4", "gate_type=scalar"], "gate_rank=4: only an elementwise gate has a rank, not 'scalar'"),
        ([*OWN, "trained_rank=4", "gate_rank=2"], "trained_rank=4 and gate_rank=2: a gate is trained at a rank or cut"),
        ([*OWN, "train_base=lora"], "train_base='lora': it needs a rank of the adapters; set lora_rank, such as 16"),
        (
            [*OWN, "train_base=lora", "lora_rank=8", "student=a-melt"],
            "train_base='lora': the base is the teacher's then, and student=a-melt brings one of its own",
        ),
        ([*OWN, "lora_rank=8"], "lora_rank=8: only train_base=lora has adapters, not 'full'"),
        (
            [*OWN, "train_base=frozen", "gate_type=mean"],
            "train_base='frozen': a gate of type 'mean' learns nothing, so nothing would be trained; set",
        ),
        (
            [*OWN, "train_base=frozen", "alignment.loops=[1, 4]"],
            "alignment.loops=[1, 4]: one loop has no gate, so with train_base='frozen' there is nothing to train in it",
        ),
        (
            [*OWN, "alignment.chunk_sizes=[256, 384]"],
            "chunk_sizes: 384 does not divide 512, the largest; documents of a pack begin on multiples of that",
        ),
        ([*OWN, "gate_start=fast"], "gate_start='fast': it must be 'mean', or a number"),
        ([*OWN, "gate_start=nan"], "gate_start=nan: it must be 'mean', or a number"),
        ([*OWN, "alignment.distance=far"], "alignment.distance='far': input should be 'relative', 'sum' or 'mean'"),
        ([*OWN, "dtype=fp8"], "dtype='fp8': input should be 'float32' or 'bfloat16'"),
        ([*OWN, "decode_mode=fast"], "decode_mode='fast': input should be 'token' or 'chunk'"),
        ([*OWN, "batch_tokens=15000"], "batch_tokens=15000 is not a multiple of sequence_length=10000"),
        ([*OWN, "alignment.batch=3"], "alignment.batch is the same in all stages: set batch_tokens instead"),
        ([*OWN, "seed.x=3"], "seed={'x': 3}"),
        ([*OWN, "dtype.x=3"], "dtype is a value and has no fields"),
        ([*OWN, "faster"], "'faster' changes nothing: write key=value"),
        (["kind=mine"], "kind = 'bundled' or 'post-training'"),
    ],
)
def test_a_wrong_word_is_named_with_its_remedy(words, says):
    with pytest.raises(RecipeError) as raised:
        load_recipe("melt-1.6b", words)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_recipe_that_is_not_there_is_told_of_those_that_are():
    with pytest.raises(RecipeError, match=r"no recipe melt-9b: name a TOML file, or one of demo, melt-1\.6b"):
        load_recipe("melt-9b")
    assert bundled_recipes() == ["demo", "melt-1.6b", "melt-1.6b-paper"]


def test_a_file_that_is_no_toml_is_named_with_the_line(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("kind = \n")
    with pytest.raises(RecipeError, match=r"mine\.toml cannot be read as TOML: .*line 1"):
        load_recipe(str(path))
