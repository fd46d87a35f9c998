"""A chat task with checkable answers and endless data: who is where.

Every sentence puts somebody in a place or with one of the three people named before, so an answer follows a
chain of sentences, backwards, to a place:

    Find everybody. Ann is in Rome. Bob is with Ann. Eve is in Oslo. Dan is with Bob. ... Where is Dan?
    <think>Follow Dan Bob Ann Rome</think>In Rome.

With sixteen sentences a prompt spans four chunks of 32 tokens, and chains cross them at random. One step of a chain
needs two attentions, one after the other: a name must have met the name before it in its sentence before it can be
found by that. One layer in one loop cannot do it; one layer in several loops can.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

NAMES = tuple(
    "Ann Ben Bob Cara Dan Eve Finn Gus Hana Ian Jack Jane Kim Lena Leo Mia Noah Olga Pam Rosa Sam Tom Uma Zoe".split()
)
PLACES = tuple("Bern Cairo Dakar Delhi Kyoto Lima Milan Oslo Paris Perth Porto Quito Rome Seoul Tokyo Turin".split())
SENTENCES = 16
"""Sentences of a full-grown story; training also sees shorter ones."""
REACH = 3
"""A sentence refers to one of this many before it."""
PLACE_SHARE = 0.2
"""The share of sentences that name a place; the first always does."""

HELDOUT_SHARE = 8
"""One prompt in this many is held out."""


@dataclass(frozen=True)
class Question:
    """A user message, and the reasoning and the answer it deserves.

    Attributes:
        chain: how many sentences the answer follows.
    """

    prompt: str
    reasoning: str
    answer: str
    chain: int

    @property
    def reply(self) -> str:
        """The assistant's whole message, reasoning first."""
        return f"<think>{self.reasoning}</think>{self.answer}"

    def check(self, reply: str) -> bool:
        """Whether `reply`, the text after `</think>`, is the answer; white space around it does not count."""
        return reply.strip() == self.answer


def questions(split: Split, seed: int | str, sentences: int = SENTENCES) -> Iterator[Question]:
    """Endless questions of this many sentences; no prompt of one split is ever one of the other."""
    draw = random.Random(f"{split} {seed}")
    while True:
        question = draw_question(draw, sentences)
        if split_of(question.prompt) == split:
            yield question


def draw_question(draw: random.Random, sentences: int) -> Question:
    """One random story with a question about anybody in it."""
    names = draw.sample(NAMES, sentences)
    story, leads_to = ["Find everybody."], dict[str, str]()
    for person, name in enumerate(names):
        if person == 0 or draw.random() < PLACE_SHARE:
            leads_to[name] = draw.choice(PLACES)
            story.append(f"{name} is in {leads_to[name]}.")
        else:
            leads_to[name] = draw.choice(names[max(0, person - REACH) : person])
            story.append(f"{name} is with {leads_to[name]}.")
    asked = draw.choice(names)
    steps = [asked]
    while steps[-1] in leads_to:
        steps.append(leads_to[steps[-1]])
    return Question(
        prompt=" ".join([*story, f"Where is {asked}?"]),
        reasoning=" ".join(["Follow", *steps]),
        answer=f"In {steps[-1]}.",
        chain=len(steps) - 1,
    )


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, by a hash of its text that never changes."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] % HELDOUT_SHARE == 0 else "train"
