"""Word problems: what a long word comes to, asked after every letter; its first letters never stop mattering.

- *s3*: a letter is one of the six permutations of three things, and the answer their product so far. S3 is solvable:
  a transformer of some fixed depth can find the product of a word of any length (Liu et al., arXiv 2210.10749).
- *s5*: a letter is a swap of two neighbours of five, or the turn of all five. S5 is not solvable: its word problem is
  complete for NC1, so (unless TC0 = NC1) every transformer of a fixed depth fails from some length on, and a model that
  is recurrent along the sequence need not (Merrill et al., arXiv 2404.08819).
- *chains*: a letter is a sentence. `Ann is in Rome.` for three people; from then on `Bob is with Ann.`, where Ann is
  the last of one of three chains, drawn at random, and Bob, of three who are last of none, becomes it. The answer is
  the place of who has come. Chains never merge, and the word is as long as the three together.

Words are endless, a function of split and seed. The first letters of a word decide on its split, so that a held-out
word's answers from then on are those of words that no training batch began with.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from melt_serve.task.who_is_where import HELDOUT_SHARE, NAMES, PLACES, Split

Permutation = tuple[int, ...]
DECIDING_LETTERS = 12
"""Letters that decide on a word's split: shorter words are too few to be kept apart."""


@dataclass(frozen=True)
class Word:
    """A word and what each of its beginnings comes to, as numbers of letters and of answers."""

    letters: tuple[int, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Permutations:
    """The product of a word's letters in the symmetric group.

    Attributes:
        generators: the letters; letter i sends place j to `generators[i][j]`.
    """

    name: str
    what: str
    generators: tuple[Permutation, ...]

    @cached_property
    def elements(self) -> tuple[Permutation, ...]:
        """The group's elements, by number of the answer."""
        return tuple(itertools.permutations(range(len(self.generators[0]))))

    @cached_property
    def products(self) -> list[list[int]]:
        """The answer after each letter, as [answer before it][letter]."""
        number = {element: i for i, element in enumerate(self.elements)}
        return [[number[compose(element, each)] for each in self.generators] for element in self.elements]

    @property
    def letters(self) -> int:
        """How many letters there are."""
        return len(self.generators)

    @property
    def answers(self) -> int:
        """How many answers there are."""
        return len(self.elements)

    def draw(self, draw: random.Random, length: int) -> Word:
        """Draw a word, all letters equally likely."""
        letters = draw.choices(range(self.letters), k=length)
        answers = itertools.accumulate(letters, lambda product, letter: self.products[product][letter], initial=0)
        return Word(tuple(letters), tuple(answers)[1:])


def compose(first: Permutation, then: Permutation) -> Permutation:
    """Apply one permutation after another: place i goes to then[first[i]]."""
    return tuple(then[place] for place in first)


@dataclass(frozen=True)
class Chains:
    """Chains of people who came to be with each other, told in order; letters are sentences.

    Attributes:
        names: who there is.
        places: where chains begin, one chain each.
    """

    name: str
    what: str
    names: Sequence[str]
    places: Sequence[str]

    @cached_property
    def sentences(self) -> tuple[tuple[str, str], ...]:
        """Who is spoken of, and in which place or with whom, by letter."""
        return tuple((name, to) for name in self.names for to in (*self.places, *self.names) if to != name)

    @cached_property
    def numbers(self) -> dict[tuple[str, str], int]:
        """The letter of each sentence."""
        return {sentence: letter for letter, sentence in enumerate(self.sentences)}

    @property
    def letters(self) -> int:
        """How many letters there are."""
        return len(self.sentences)

    @property
    def answers(self) -> int:
        """How many answers there are."""
        return len(self.places)

    def draw(self, draw: random.Random, length: int) -> Word:
        """Draw the chains' beginnings in random order, then let one chain at a time go on."""
        last = draw.sample(self.names, len(self.places))  # of the chain that began in places[i]
        begins = draw.sample(range(len(self.places)), len(self.places))
        letters = [self.numbers[last[chain], self.places[chain]] for chain in begins]
        answers = list(begins)
        while len(letters) < length:
            chain = draw.randrange(len(last))
            name = draw.choice([name for name in self.names if name not in last])
            letters.append(self.numbers[name, last[chain]])
            answers.append(chain)
            last[chain] = name
        return Word(tuple(letters[:length]), tuple(answers[:length]))


SWAPS = tuple(tuple({i: i + 1, i + 1: i}.get(j, j) for j in range(5)) for i in range(4))
WordProblem = Permutations | Chains
PROBLEMS: dict[str, WordProblem] = {
    problem.name: problem
    for problem in (
        Permutations("s3", "product of permutations of 3", tuple(itertools.permutations(range(3)))),
        Permutations("s5", "product of swaps and turns of 5", (*SWAPS, (1, 2, 3, 4, 0))),
        Chains("chains", "where a chain of people began", NAMES[:6], PLACES[:3]),
    )
}


def words(problem: WordProblem, split: Split, seed: int | str, length: int) -> Iterator[Word]:
    """Yield endless words of one length; no word of the other split has their first `DECIDING_LETTERS`."""
    draw = random.Random(f"{problem.name} {split} {seed}")
    while True:
        word = problem.draw(draw, max(length, DECIDING_LETTERS))
        if split_of(problem, word) == split:
            yield Word(word.letters[:length], word.answers[:length])


def split_of(problem: WordProblem, word: Word) -> Split:
    """Return the split a word belongs to, by a hash of its first letters that never changes."""
    first = " ".join(map(str, (problem.name, *word.letters[:DECIDING_LETTERS])))
    return "heldout" if hashlib.sha256(first.encode()).digest()[0] % HELDOUT_SHARE == 0 else "train"
