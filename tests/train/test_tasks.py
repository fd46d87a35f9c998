"""The demo's task: endless, repeatable, checkable, and held out for real."""

from itertools import islice

from melt_serve.train.tasks import ITEMS, NAMES, PLACES, Question, questions, split_of


def test_the_same_seed_asks_the_same_questions():
    assert list(islice(questions("train", 3), 50)) == list(islice(questions("train", 3), 50))
    assert list(islice(questions("train", 3), 50)) != list(islice(questions("train", 4), 50))


def test_training_and_held_out_questions_share_no_prompt():
    train = {question.prompt for question in islice(questions("train", 0), 3000)}
    heldout = {question.prompt for question in islice(questions("heldout", 0), 1000)}
    assert not train & heldout
    assert all(split_of(prompt) == "heldout" for prompt in heldout)


def test_a_split_never_moves():
    assert [i for i in range(60) if split_of(str(i)) == "heldout"] == [22, 48, 53, 57]


def test_every_question_has_one_answer_in_its_story():
    for question in islice(questions("train", 1), 300):
        story, _, _ = question.prompt.rpartition(". ")
        assert question.reasoning in f"{story}."
        named = [word for word in (*NAMES, *ITEMS, *PLACES) if word in story.replace(".", "").split()]
        assert len(named) == 3
        assert question.answer.strip(".").split()[-1] in named


def test_check_takes_the_answer_and_nothing_else():
    question = Question("Where is the ball?", "Ann hid the ball in the hall.", "In the hall.")
    assert question.check("In the hall.") and question.check("\n In the hall. ")
    assert not question.check("In the barn.")
    assert not question.check("In the hall") and not question.check("") and not question.check("In the hall. Yes.")
