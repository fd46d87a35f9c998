"""The demo's task: endless, repeatable, checkable, and held out for real."""

import re
from itertools import islice, pairwise

import pytest

from melt_serve.train.tasks import NAMES, PLACES, SENTENCES, Question, questions, split_of


def solve(prompt: str) -> str:
    """The place, by reading the story forwards, as a person would."""
    places: dict[str, str] = {}
    for name, how, target in re.findall(r"(\w+) is (in|with) (\w+)\.", prompt):
        places[name] = target if how == "in" else places[target]
    return places[re.search(r"Where is (\w+)\?$", prompt)[1]]


@pytest.mark.parametrize("sentences", range(2, SENTENCES + 1))
def test_every_answer_follows_from_its_story(sentences):
    for question in islice(questions("train", 1, sentences), 200):
        assert len(re.findall(r" is (?:in|with) ", question.prompt)) == sentences
        assert question.answer == f"In {solve(question.prompt)}."
        assert 1 <= question.chain <= sentences


def test_the_reasoning_walks_the_chain():
    for question in islice(questions("heldout", 1), 200):
        first, *steps, place = question.reasoning.split()
        assert first == "Follow" and len(steps) == question.chain and question.answer == f"In {place}."
        assert question.prompt.endswith(f"Where is {steps[0]}?")
        assert f"{steps[-1]} is in {place}." in question.prompt and place in PLACES
        for name, other in pairwise(steps):
            assert f"{name} is with {other}." in question.prompt and name in NAMES


def test_chains_are_short_and_long():
    chains = [question.chain for question in islice(questions("heldout", 1), 1000)]
    assert all(chains.count(length) >= 30 for length in (1, 2, 3, 4, 5))


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
    question = Question("Where is Ann?", "Follow Ann Rome", "In Rome.", 1)
    assert question.check("In Rome.") and question.check("\n In Rome. ")
    assert not question.check("In Oslo.")
    assert not question.check("In Rome") and not question.check("") and not question.check("In Rome. In Oslo.")
