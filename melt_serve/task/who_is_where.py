"""A chat task with checkable answers and endless data: who is where.

Every sentence puts somebody in a place or with one of the three people named before, so an answer follows a
chain of sentences, backwards, to a place. It is said aloud in the reasoning, or followed in silence:

    Find everybody. Ann is in Rome. Bob is with Ann. Eve is in Oslo. Dan is with Bob. ... Where is Dan?
    <think>Follow Dan Bob Ann Rome</think>In Rome.

    Answer at once. Ann is in Rome. Bob is with Ann. Eve is in Oslo. Dan is with Bob. ... Where is Dan?
    <think></think>In Rome.

With sixteen sentences a prompt spans four chunks of 32 tokens, and chains cross them at random. One step of a chain
needs two attentions, one after the other: a name must have met the name before it in its sentence before it can be
found by that. One layer in one loop cannot do it; in two loops it can, and every further step in silence takes one
more. So an answer aloud needs two loops, and one at once two to four: what is said aloud need not be thought.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "heldout"]
Kind = Literal["aloud", "silent"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES = tuple(
    "Ann Ben Bob Cara Dan Eve Finn Gus Hana Ian Jack Jane Kim Lena Leo Mia Noah Olga Pam Rosa Sam Tom Uma Zoe".split()
)
PLACES = tuple("Bern Cairo Dakar Delhi Kyoto Lima Milan Oslo Paris Perth Porto Quito Rome Seoul Tokyo Turin".split())
SENTENCES = 16
"""Sentences of a full-grown story; training also sees shorter ones."""
REACH = 3
"""A sentence refers to one of this many before it."""
INSTRUCTIONS: dict[Kind, str] = {"aloud": "Find everybody.", "silent": "Answer at once."}
"""What a story begins with."""
SILENT_STEPS = 3
"""The longest chain that is followed in silence."""
PLACE_SHARE = 0.2
"""The share of sentences that name a place; the first always does."""
HELDOUT_SHARE = 8
"""One prompt in this many is held out."""


@dataclass(frozen=True)
class Question:
    """A user message, and the reasoning and the answer it deserves.

    Attributes:
        steps: the chain, from who is asked about to a place.
        kind: whether the reply says the chain aloud.
    """

    prompt: str
    steps: tuple[str, ...]
    kind: Kind

    @property
    def answer(self) -> str:
        """What is to be said after the reasoning."""
        return f"In {self.steps[-1]}."

    @property
    def reply(self) -> str:
        """The assistant's whole message, reasoning first."""
        return self.reply_within(SILENT_STEPS)

    def reply_within(self, steps: int) -> str:
        """Return what a model knows of the reply that takes at most so many steps for a word; always as many words.

        With fewer than `SILENT_STEPS` it says how far it came: `<think></think>In Bob.`
        """
        if self.kind == "silent":
            return f"<think></think>In {self.steps[min(steps, len(self.steps) - 1)]}."
        said = self.steps[1:] if steps else self.steps[:-1]
        return f"<think>{' '.join(['Follow', self.steps[0], *said])}</think>{self.answer}"

    def check(self, reply: str) -> bool:
        """Tell whether `reply`, the text after `</think>`, is the answer; white space around it does not count."""
        return reply.strip() == self.answer


def questions(
    split: Split, seed: int | str, sentences: int = SENTENCES, kinds: Sequence[Kind] = KINDS
) -> Iterator[Question]:
    """Yield endless questions of this many sentences; no prompt of one split is ever one of the other."""
    draw = random.Random(f"{split} {seed}")
    while True:
        question = draw_question(draw, sentences, kinds)
        if split_of(question.prompt) == split:
            yield question


def draw_question(draw: random.Random, sentences: int, kinds: Sequence[Kind]) -> Question:
    """Draw one random story with a question: aloud about anybody in it, silent about one of the nearer, by chain."""
    names, kind = draw.sample(NAMES, sentences), draw.choice(kinds)
    story, leads_to = [INSTRUCTIONS[kind]], dict[str, str]()
    for person, name in enumerate(names):
        if person == 0 or draw.random() < PLACE_SHARE:
            leads_to[name] = draw.choice(PLACES)
            story.append(f"{name} is in {leads_to[name]}.")
        else:
            leads_to[name] = draw.choice(names[max(0, person - REACH) : person])
            story.append(f"{name} is with {leads_to[name]}.")
    chains = [chain_from(name, leads_to) for name in names]
    if kind == "silent":
        length = draw.choice(sorted({len(chain) for chain in chains if len(chain) <= SILENT_STEPS + 1}))
        chains = [chain for chain in chains if len(chain) == length]
    steps = draw.choice(chains)
    return Question(" ".join([*story, f"Where is {steps[0]}?"]), steps, kind)


def chain_from(name: str, leads_to: dict[str, str]) -> tuple[str, ...]:
    """Follow the story from somebody to a place; return everybody on the way, and the place."""
    steps = [name]
    while steps[-1] in leads_to:
        steps.append(leads_to[steps[-1]])
    return tuple(steps)


def split_of(prompt: str) -> Split:
    """Return the split a prompt belongs to, by a hash of its text that never changes."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] % HELDOUT_SHARE == 0 else "train"
