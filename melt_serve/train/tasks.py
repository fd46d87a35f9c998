"""An easy chat task with checkable answers and endless data: find the one fact a story hides.

Among sentences about nothing much, one says who hid what where; the question asks for a part of it:

    The birds sing in a tree. Bob hid the lamp in the barn. It rains all day long. ... Where is the lamp?
    <think>Bob hid the lamp in the barn.</think>In the barn.

Stories span two to four chunks of 32 tokens, so most answers need a row that an earlier chunk wrote.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

NAMES = tuple("Ann Ben Bob Cara Dan Eve Finn Gus Hana Ian Jane Kim Leo Mia Noah Sam".split())
ITEMS = tuple("ball bell book coat coin cup drum fork hat key kite lamp map pen ring rope".split())
PLACES = tuple("attic barn bus cave den gym hall hut lab loft mill park shed shop tent yard".split())
FILLERS = (
    "The sun is low today.",
    "The birds sing in a tree.",
    "It rains all day long.",
    "We walk home at night.",
    "The road is long and wet.",
    "A dog runs very fast.",
    "The wind is cold now.",
    "They eat bread and soup.",
    "Two cats sleep on a wall.",
    "The sea is calm again.",
    "A red car drives by.",
    "The moon is out early.",
    "Some snow fell last week.",
    "He reads an old letter.",
    "The tea is still hot.",
    "She sings a long song.",
)
SENTENCES = range(5, 13)
"""How many sentences a story may have, the fact included."""

HELDOUT_SHARE = 8
"""One prompt in this many is held out."""


@dataclass(frozen=True)
class Question:
    """A user message, and the reasoning and the answer it deserves."""

    prompt: str
    reasoning: str
    answer: str

    @property
    def reply(self) -> str:
        """The assistant's whole message, reasoning first."""
        return f"<think>{self.reasoning}</think>{self.answer}"

    def check(self, reply: str) -> bool:
        """Whether `reply`, the text after `</think>`, is the answer; white space around it does not count."""
        return reply.strip() == self.answer


def questions(split: Split, seed: int) -> Iterator[Question]:
    """Endless questions; no prompt of one split is ever one of the other."""
    draw = random.Random(f"{split} {seed}")
    while True:
        question = draw_question(draw)
        if split_of(question.prompt) == split:
            yield question


def draw_question(draw: random.Random) -> Question:
    """One random story with its question."""
    name, item, place = draw.choice(NAMES), draw.choice(ITEMS), draw.choice(PLACES)
    fact = f"{name} hid the {item} in the {place}."
    story = draw.sample(FILLERS, draw.choice(SENTENCES) - 1)
    story.insert(draw.randint(0, len(story)), fact)
    asked, answer = draw.choice(
        (
            (f"Who hid the {item}?", f"{name}."),
            (f"What did {name} hide?", f"The {item}."),
            (f"Where is the {item}?", f"In the {place}."),
        )
    )
    return Question(" ".join([*story, asked]), fact, answer)


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, by a hash of its text that never changes."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] % HELDOUT_SHARE == 0 else "train"
