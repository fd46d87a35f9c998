"""The demo's task: endless, repeatable, checkable, and held out for real."""

import re
from itertools import islice, pairwise

import pytest

from melt_serve.task.who_is_where import NAMES, PLACES, SENTENCES, SILENT_STEPS, Question, questions, split_of


def solve(prompt: str) -> str:
    """Find the place by reading the story forwards, as a person would."""
    places: dict[str, str] = {}
    for name, how, target in re.findall(r"(\w+) is (in|with) (\w+)\.", prompt):
        places[name] = target if how == "in" else places[target]
    return places[re.search(r"Where is (\w+)\?$", prompt)[1]]


@pytest.mark.parametrize("sentences", range(2, SENTENCES + 1))
def test_every_answer_follows_from_its_story(sentences):
    for question in islice(questions("train", 1, sentences), 200):
        assert len(re.findall(r" is (?:in|with) ", question.prompt)) == sentences
        assert question.answer == f"In {solve(question.prompt)}."
        assert 1 <= len(question.steps) - 1 <= (sentences if question.kind == "aloud" else SILENT_STEPS)


def test_the_reasoning_walks_the_chain_aloud():
    for question in islice(questions("heldout", 1, kinds=["aloud"]), 200):
        reasoning, answer = re.fullmatch("<think>Follow (.*)</think>(.*)", question.reply).groups()
        *steps, place = reasoning.split()
        assert question.prompt.startswith("Find everybody. ") and question.answer == answer == f"In {place}."
        assert question.prompt.endswith(f"Where is {steps[0]}?")
        assert f"{steps[-1]} is in {place}." in question.prompt and place in PLACES
        for name, other in pairwise(steps):
            assert f"{name} is with {other}." in question.prompt and name in NAMES


def test_a_silent_reply_does_not_reason():
    for question in islice(questions("heldout", 1, kinds=["silent"]), 200):
        assert question.prompt.startswith("Answer at once. ")
        assert question.reply == f"<think></think>In {solve(question.prompt)}."


def test_chains_are_short_and_long():
    aloud = [len(question.steps) - 1 for question in islice(questions("heldout", 1, kinds=["aloud"]), 1000)]
    assert all(aloud.count(length) >= 30 for length in (1, 2, 3, 4, 5))
    silent = [len(question.steps) - 1 for question in islice(questions("heldout", 1, kinds=["silent"]), 1000)]
    assert all(silent.count(length) >= 250 for length in range(1, SILENT_STEPS + 1))


def test_with_few_steps_a_reply_says_how_far_they_lead():
    silent = Question("Where is Dan?", ("Dan", "Bob", "Ann", "Rome"), "silent")
    assert [silent.reply_within(steps).partition("</think>")[2] for steps in range(5)] == [
        "In Dan.",
        "In Bob.",
        "In Ann.",
        "In Rome.",
        "In Rome.",
    ]
    aloud = Question("Where is Dan?", ("Dan", "Bob", "Rome"), "aloud")
    assert aloud.reply_within(0) == "<think>Follow Dan Dan Bob</think>In Rome."
    assert aloud.reply_within(1) == aloud.reply_within(2) == aloud.reply == "<think>Follow Dan Bob Rome</think>In Rome."


def test_the_same_seed_asks_the_same_questions():
    assert list(islice(questions("train", 3), 50)) == list(islice(questions("train", 3), 50))
    assert list(islice(questions("train", 3), 50)) != list(islice(questions("train", 4), 50))


def test_training_and_held_out_questions_share_no_prompt():
    train = {
        question.prompt for sentences in (2, SENTENCES) for question in islice(questions("train", 0, sentences), 2000)
    }
    heldout = {
        question.prompt for sentences in (2, SENTENCES) for question in islice(questions("heldout", 0, sentences), 500)
    }
    assert not train & heldout
    assert all(split_of(prompt) == "heldout" for prompt in heldout)


def test_a_split_never_moves():
    assert [i for i in range(60) if split_of(str(i)) == "heldout"] == [22, 48, 53, 57]


def test_check_takes_the_answer_and_nothing_else():
    question = Question("Where is Ann?", ("Ann", "Rome"), "aloud")
    assert question.check("In Rome.") and question.check("\n In Rome. ")
    assert not question.check("In Oslo.")
    assert not question.check("In Rome") and not question.check("") and not question.check("In Rome. In Oslo.")
