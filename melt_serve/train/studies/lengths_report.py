"""The study of lengths as Markdown, curves and JSON: accuracy after every letter, and what each model cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from melt_serve.train.results import Record, check_report, markdown_table, spread, write_report
from melt_serve.train.session import StudyError
from melt_serve.train.studies.length_run import (
    LONGER,
    MEASURED_WORDS,
    MODELS_UNDER_TEST,
    Curriculum,
    ModelUnderTest,
    settings,
)
from melt_serve.train.studies.word_problems import DECIDING_LETTERS, PROBLEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Found = Mapping[str, Sequence["Learned"]]
HELD = 0.9
"""A model holds on as long as this share of its answers is right."""
INTRODUCTION = """\
# Accuracy against length

Written by `python -m melt_serve.train lengths --report`; read in docs/studies.md,
"Beyond the paper". Every model learns a
word problem from nothing: {curriculum.steps} steps of {curriculum.batch} words, whose length grows from
{curriculum.first_length} to {curriculum.length} letters over the first {curriculum.grown_at:.0%} of the steps;
cross-entropy of the last loop's answer after every letter, Muon and AdamW, float32. Hidden size
{config.hidden_size}, {config.num_attention_heads} heads, T = {config.total_ut_steps}. {runs} runs, {threads}
thread(s) on {cores} CPU cores, {cpu:.0f} s of CPU time together, torch {torch}.

- All models of a task see the same words in the same order, as many letters each, but for those named `-4x`, which see
  four times as many. `plain` is a transformer with as many layers as a LoopLM has loops, so of equal compute a letter:
  it has four times the weights.
- **right after n**: the share of {words} held-out words of {longest} letters whose n-th answer is right. No word of
  training begins with the {deciding} letters of one of these; of shorter words there are too few to be kept apart.
  Beyond {curriculum.length} letters no model was trained, and none has met such positions in its rotary embedding,
  which limits all of them.
- **holds to**: the last letter up to which every answer is right in at least {held:.0%} of the words.
  Without a start letter (`-start`) no model but MELT with C = 1 can tell a letter from that letter twice, so that it
  misses words that begin so, and holds to 1.
- **in sequence**: layers that must be run one after another before the {curriculum.length}-th letter is answered: the
  depth that the model can put to use, and what makes it slow.
- **multiply-adds**: of the matrices inside the layers, for a letter.
- **CPU**: seconds that the steps of a run took. Other work shared the cores.
- With several seeds: the mean (lowest to highest). A guess is right in {guesses}.
"""


@dataclass(frozen=True)
class Learned:
    """A model with its runs of one task, one a seed."""

    under_test: ModelUnderTest
    records: Sequence[Record]

    def right_after(self, letters: int) -> list[float]:
        """Return the share of right answers after so many letters, one value a run."""
        return [record["right"][letters - 1] for record in self.records]

    @property
    def curve(self) -> list[float]:
        """The share of right answers by letter, mean over runs."""
        return [mean(each) for each in zip(*(record["right"] for record in self.records), strict=True)]


def held_to(right: Sequence[float]) -> int:
    """Return the last letter before the first whose answers are not held."""
    return next((letters for letters, share in enumerate(right) if share < HELD), len(right))


def write_lengths_report(
    path: Path,
    tasks: Sequence[str],
    models: Sequence[ModelUnderTest],
    curriculum: Curriculum,
    records: Sequence[Record],
) -> list[Path]:
    """Write `path`, and a plot and JSON beside it; return all three.

    Raises:
        StudyError: no run of these is done.
        OSError: see `check_report`.
    """
    check_report(path)
    found = {}
    for task in tasks:
        runs = [Learned(model, records_of(model, task, curriculum, records)) for model in models]
        found[task] = [each for each in runs if each.records]
    found = {task: learned for task, learned in found.items() if learned}
    if not found:
        raise StudyError(f"no run of {curriculum.steps} steps is done yet: run the same command without --report")
    used = [record for learned in found.values() for each in learned for record in each.records]
    head, caption = introduction(found, curriculum, used), "Right answers by length, a panel a task"
    sections = []
    for task, learned in found.items():
        sections += [f"## `{task}`: {PROBLEMS[task].what}", table(learned, curriculum)]
    return write_report(path, head, caption, plot(found, curriculum), sections, used)


def records_of(model: ModelUnderTest, task: str, curriculum: Curriculum, records: Sequence[Record]) -> list[Record]:
    """Choose the runs of this model and task as they are defined now."""
    return [record for record in records if record["settings"] == settings(model, task, curriculum, record["seed"])]


def introduction(found: Found, curriculum: Curriculum, used: Sequence[Record]) -> str:
    """Say what was run and what the columns mean."""
    first = used[0]
    return INTRODUCTION.format(
        curriculum=curriculum,
        config=ModelUnderTest("", "").config(1),
        runs=len(used),
        threads=first["threads"],
        cores=first["cores"],
        cpu=sum(record["cpu_seconds"] for record in used),
        torch=first["torch"],
        words=MEASURED_WORDS,
        longest=LONGER * curriculum.length,
        deciding=DECIDING_LETTERS,
        held=HELD,
        guesses=", ".join(f"{1 / PROBLEMS[task].answers:.1%} of {task}" for task in found),
    )


def table(learned: Sequence[Learned], curriculum: Curriculum) -> str:
    """Format one task's outcomes, a line a model."""
    lengths = [round(curriculum.length * share) for share in (0.5, 1, 1.5, 2, LONGER)]
    heads = [f"right after {length}" for length in lengths]
    costs = ("weights", "multiply-adds", "in sequence", "letters seen", "CPU, s", "ms a step")
    lines = [("model", "what", "seeds", *heads, "holds to", *costs)]
    for each in learned:
        record = each.records[0]
        lines.append(
            (
                f"`{each.under_test.name}`",
                each.under_test.what,
                str(len(each.records)),
                *(spread(each.right_after(length), ".1%") for length in lengths),
                spread([held_to(run["right"]) for run in each.records], ".0f"),
                f"{record['weights']:,}",
                f"{record['multiply_adds']:,}",
                str(each.under_test.layers_in_sequence(curriculum.length)),
                f"{record['letters']:,}",
                f"{mean(run['cpu_seconds'] for run in each.records):.0f}",
                f"{mean(1000 * run['cpu_seconds'] / run['steps'] for run in each.records):.0f}",
            )
        )
    return markdown_table(lines)


def plot(found: Found, curriculum: Curriculum) -> "Figure":
    """Draw a panel a task, a line a model: right answers by letter, and where training ended."""
    from matplotlib.figure import Figure

    colors = {name: f"C{i}" for i, name in enumerate(MODELS_UNDER_TEST)}
    figure = Figure(figsize=(5 * len(found), 4.4), layout="constrained")
    for axes, (task, learned) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for each in learned:
            melt, patient = each.under_test.chunk_size is not None, each.under_test.patience > 1
            style = "-" if melt else ":" if patient else "--"
            look = {"color": colors[each.under_test.name], "linestyle": style, "linewidth": 1.4}
            axes.plot(range(1, len(each.curve) + 1), each.curve, label=each.under_test.name, **look)
        axes.axvline(curriculum.length, color="gray", linewidth=0.8)
        axes.axhline(1 / PROBLEMS[task].answers, color="gray", linewidth=0.8, linestyle=":")
        axes.set(title=f"{task}: {PROBLEMS[task].what}", xlabel="letters", ylim=(0, 1.02))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.get_axes()[0].set_ylabel("share of right answers (gray: length of training; a guess)")
    return figure
