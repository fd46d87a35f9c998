"""Accuracy against length: answers are right, held-out words stay apart, runs go on, the report shows them."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from melt_serve.train.__main__ import main
from melt_serve.train.results import append_record, read_records
from melt_serve.train.session import Paused, Session
from melt_serve.train.studies import length_run, word_problems
from melt_serve.train.studies.length_run import CURRICULUM, LOOPLM, MODELS_UNDER_TEST, PLAIN, learn, measure
from melt_serve.train.studies.lengths import run_all
from melt_serve.train.studies.lengths_report import held_to, write_lengths_report
from melt_serve.train.studies.word_problems import PROBLEMS, split_of, words

TINY = replace(CURRICULUM, steps=5, batch=3, first_length=3, length=6)
MODELS = [MODELS_UNDER_TEST[name] for name in ("looplm", "melt-4")]
SECONDS = ("seconds", "cpu_seconds")


@pytest.fixture(scope="module", autouse=True)
def few_words():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_run, "MEASURED_WORDS", 20)
        patch.setattr(length_run, "MEASURED_BATCH", 10)
        yield


def drawn(task, split="train", seed=0, length=40, count=30):
    return list(islice(words(PROBLEMS[task], split, seed, length), count))


@pytest.mark.parametrize("task", ["s3", "s5"])
def test_an_answer_is_where_the_letters_so_far_take_every_place(task):
    problem = PROBLEMS[task]
    for word in drawn(task):
        places = range(len(problem.generators[0]))
        at = list(places)
        for letter, answer in zip(word.letters, word.answers, strict=True):
            at = [problem.generators[letter][place] for place in at]
            assert problem.elements[answer] == tuple(at)


@pytest.mark.parametrize(("task", "order"), [("s3", 6), ("s5", 120)])
def test_the_letters_reach_the_whole_group(task, order):
    problem, reached = PROBLEMS[task], {0}
    while more := {each for answer in reached for each in problem.products[answer]} - reached:
        reached |= more
    assert len(reached) == problem.answers == order
    assert problem.elements[0] == tuple(range(len(problem.generators[0])))


def test_an_answer_is_the_place_that_the_sentences_lead_back_to():
    problem, deepest = PROBLEMS["chains"], 0
    for word in drawn("chains"):
        is_at: dict[str, tuple[str, int]] = {}
        for letter, answer in zip(word.letters, word.answers, strict=True):
            name, to = problem.sentences[letter]
            place, depth = (to, 0) if to in problem.places else is_at[to]
            is_at[name] = (place, depth + 1)
            deepest = max(deepest, depth)
            assert problem.places[answer] == place
        assert set(word.answers[-20:]) <= set(range(3)) and len(set(word.answers)) == 3
    assert deepest > 8


def test_no_chain_ever_merges_with_another():
    problem = PROBLEMS["chains"]
    for word in drawn("chains"):
        told = [problem.sentences[letter] for letter in word.letters]
        assert sorted(to for _, to in told[:3]) == sorted(problem.places)
        last = {answer: name for (name, _), answer in zip(told[:3], word.answers, strict=False)}
        for (name, to), answer in zip(told[3:], word.answers[3:], strict=True):
            assert last[answer] == to and name not in last.values()
            last[answer] = name


@pytest.mark.parametrize("length", [2, 5])
def test_no_held_out_word_begins_like_one_of_training(length, monkeypatch):
    monkeypatch.setattr(word_problems, "DECIDING_LETTERS", 2)  # so few that both splits draw all they have
    beginnings = {
        split: {word.letters[:2] for word in drawn("s3", split, length=length, count=600)}
        for split in ("train", "heldout")
    }
    assert not beginnings["train"] & beginnings["heldout"]
    assert len(beginnings["train"] | beginnings["heldout"]) == 36 and beginnings["heldout"]


@pytest.mark.parametrize("task", PROBLEMS)
def test_words_are_a_function_of_split_and_seed(task):
    assert drawn(task) == drawn(task)
    assert len({*drawn(task), *drawn(task, seed=1), *drawn(task, "heldout")}) == 90
    assert {split_of(PROBLEMS[task], word) for word in drawn(task, "heldout")} == {"heldout"}
    assert all(len(word.letters) == len(word.answers) == 3 for word in drawn(task, length=3))


def test_words_grow_to_the_length_of_training():
    curriculum = replace(CURRICULUM, steps=100, first_length=4, length=16, grown_at=0.5)
    lengths = [curriculum.length_at(step) for step in range(100)]
    assert lengths == sorted(lengths) and lengths[0] == 4 and set(lengths[50:]) == {16} and lengths[25] == 10


@torch.no_grad()
@pytest.mark.parametrize("under_test", MODELS_UNDER_TEST.values(), ids=lambda each: each.name)
def test_what_a_model_costs_is_what_it_runs(under_test):
    model, counted = under_test.model(7, seed=0), {"multiply-adds": 0, "layers": 0}

    def count(module, arguments, output):
        counted["multiply-adds"] += module.weight.numel() * output.shape[1]

    def count_layer(module, arguments, output):
        counted["layers"] += 1

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(count_layer)
    model(torch.randint(7, (1, 16)))
    assert counted["multiply-adds"] == 16 * under_test.multiply_adds(7)
    assert counted["layers"] == under_test.layers_in_sequence(16)


def test_the_plain_transformer_computes_as_much_as_a_looplm_with_four_times_the_weights():
    assert PLAIN.multiply_adds(7) == LOOPLM.multiply_adds(7)
    assert PLAIN.layers_in_sequence(64) == LOOPLM.layers_in_sequence(64) == 4
    plain, looplm = (under_test.model(7, seed=0).model.layers for under_test in (PLAIN, LOOPLM))
    assert sum(w.numel() for w in plain.parameters()) == 4 * sum(w.numel() for w in looplm.parameters())


@torch.no_grad()
def test_only_a_start_letter_tells_a_letter_from_itself_twice():
    problem, letters = PROBLEMS["s3"], torch.tensor([[4, 4]])
    for name, alike in (("looplm", True), ("plain", True), ("looplm-start", False), ("melt-1", False)):
        under_test = MODELS_UNDER_TEST[name]
        once, twice = length_run.ask(under_test.model(6 + under_test.start, seed=0), problem, letters)[0]
        assert torch.allclose(once, twice, atol=1e-5) == alike


@torch.no_grad()
def test_a_melt_of_single_letters_is_asked_as_the_exact_model():
    model = MODELS_UNDER_TEST["melt-1"].model(6, seed=0).eval()
    right = torch.zeros(12)
    for word in drawn("s3", "heldout", "measured", 12, 20):
        right += model.token_sequential(torch.tensor(word.letters)).argmax(-1) == torch.tensor(word.answers)
    assert measure(model, PROBLEMS["s3"], 12) == (right / 20).tolist() and right.any()


def test_a_model_learns_short_words(tmp_path):
    model = MODELS_UNDER_TEST["melt-1"].model(6, seed=0)
    assert max(measure(model, PROBLEMS["s3"], 2)) < 0.5
    learn(model, PROBLEMS["s3"], replace(CURRICULUM, steps=60, batch=32, first_length=2, length=2), tmp_path, Session())
    assert min(measure(model, PROBLEMS["s3"], 2)) > 0.9


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    records = tmp_path_factory.mktemp("lengths") / "records.jsonl"
    run_all(["s3", "chains"], MODELS, TINY, (0, 1), records, Session())
    return records


def test_every_run_is_a_record_and_leaves_nothing_else(done):
    records = read_records(done)
    planned = [(seed, task, model.name) for seed in (0, 1) for task in ("s3", "chains") for model in MODELS]
    assert [(record["seed"], record["task"], record["model"]) for record in records] == planned
    assert [path.name for path in done.parent.iterdir()] == ["records.jsonl"]
    assert {len(record["right"]) for record in records} == {24}
    assert {record["letters"] for record in records} == {3 * (3 + 4 + 5 + 6 + 6)}
    assert len({record["loss"] for record in records}) == len(records)


def test_a_run_that_is_done_is_not_repeated(done):
    before = done.read_bytes()
    run_all(["s3"], MODELS, TINY, (0,), done, Session(minutes=0))
    assert done.read_bytes() == before


def test_a_run_cut_in_sessions_gives_the_record_of_an_unbroken_one(done, tmp_path):
    records, sessions = tmp_path / "records.jsonl", 0
    while not records.exists() and sessions < 20:
        try:
            run_all(["s3"], MODELS[1:], TINY, (0,), records, Session(minutes=0))
        except Paused:
            sessions += 1
    assert sessions == TINY.steps  # --minutes 0 still makes a step
    cut = read_records(records)[0]
    unbroken = next(record for record in read_records(done) if record["model"] == "melt-4")
    assert {**cut, **dict.fromkeys(SECONDS)} == {**unbroken, **dict.fromkeys(SECONDS)}
    assert cut["cpu_seconds"] > 0 and [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_the_report_says_what_the_records_say(done, tmp_path):
    records = read_records(done)
    for record in records:  # as it may come out: five steps teach nothing
        held = 9 + record["seed"] if record["model"] == "melt-4" else 0
        record["right"] = [0.95] * held + [0.5] * (24 - held)
    markdown, plot, numbers = write_lengths_report(tmp_path / "lengths.md", ["chains"], MODELS, TINY, records)
    assert json.loads(numbers.read_text()) == [
        record for model in MODELS for record in records if (record["task"], record["model"]) == ("chains", model.name)
    ]
    assert plot.read_text().startswith("<?xml")
    tables = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in tables)
    cells = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(cells) == ["`looplm`", "`melt-4`"]
    assert cells["`melt-4`"]["right after 6"] == "95.0% (95.0% to 95.0%)"
    assert cells["`melt-4`"]["right after 12"] == cells["`looplm`"]["right after 6"] == "50.0% (50.0% to 50.0%)"
    assert cells["`melt-4`"]["holds to"] == "10 (9 to 10)" and cells["`looplm`"]["holds to"] == "0 (0 to 0)"
    assert cells["`melt-4`"]["in sequence"] == "8" and cells["`melt-4`"]["seeds"] == "2"


@pytest.mark.parametrize(("right", "letters"), [([1, 1, 1], 3), ([1, 0.9, 0.89, 1], 2), ([0.5, 1], 0)])
def test_a_model_holds_on_up_to_its_first_weak_answer(right, letters):
    assert held_to(right) == letters


def command(*words):
    return main(["lengths", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "s4"], "no task 's4', only s3, s5, chains"),
        (["--models", "plain,x"], "no model 'x'"),
        (["--report", "a.md"], "no run"),
    ],
)
def test_bad_words_end_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_steps_are_counted_from_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        command("--steps", "0")
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_minutes_and_list_go_on_where_the_records_are(tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    asked = ["--tasks", "s3", "--models", "looplm", "--steps", "2", "--records", str(records)]
    assert command(*asked, "--minutes", "0") == 3
    assert "goes on" in capsys.readouterr().err
    assert command(*asked, "--list") == 0
    assert "0 of 1" in capsys.readouterr().out
    append_record(
        records, {"settings": length_run.settings(LOOPLM, "s3", replace(CURRICULUM, steps=2), 0), "seconds": 90.0}
    )
    assert command(*asked, "--list") == 0
    assert ["s3", "looplm", "1", "of", "1", "1.5"] in [
        line.split()[:6] for line in capsys.readouterr().out.splitlines()
    ]
