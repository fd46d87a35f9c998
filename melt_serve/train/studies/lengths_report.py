"""The study of lengths as Markdown, curves and JSON: accuracy after every letter, and what each model cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from melt_serve.train.results import Row, markdown_table, spread, write_json
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

Written by `python -m melt_serve.train lengths --report`; read in README.md, "Beyond the paper". Every model learns a
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
    rows: Sequence[Row]

    def right_after(self, letters: int) -> list[float]:
        """Of every run."""
        return [row["right"][letters - 1] for row in self.rows]

    @property
    def curve(self) -> list[float]:
        """The mean over runs, by letter."""
        return [mean(each) for each in zip(*(row["right"] for row in self.rows), strict=True)]


def held_to(right: Sequence[float]) -> int:
    """The last letter before the first whose answers are not held."""
    return next((letters for letters, share in enumerate(right) if share < HELD), len(right))


def write_report(
    path: Path, tasks: Sequence[str], models: Sequence[ModelUnderTest], curriculum: Curriculum, rows: Sequence[Row]
) -> list[Path]:
    """Write `path`, and a plot and JSON beside it; gives all three.

    Raises:
        StudyError: no run of these is done, or matplotlib is missing.
    """
    found = {}
    for task in tasks:
        runs = [Learned(model, rows_of(model, task, curriculum, rows)) for model in models]
        found[task] = [each for each in runs if each.rows]
    found = {task: learned for task, learned in found.items() if learned}
    if not found:
        raise StudyError(f"no run of {curriculum.steps} steps is done yet: run the same command without --report")
    try:
        figure = plot(found, curriculum)
    except ImportError:
        raise StudyError("--report needs matplotlib: pip install matplotlib") from None
    used = [row for learned in found.values() for each in learned for row in each.rows]
    files = [path, path.with_suffix(".svg"), path.with_suffix(".json")]
    path.write_text(markdown(found, curriculum, used, files[1].name), encoding="utf-8")
    figure.savefig(files[1])
    write_json(files[2], used)
    return files


def rows_of(model: ModelUnderTest, task: str, curriculum: Curriculum, rows: Sequence[Row]) -> list[Row]:
    """The runs of this model and task as they are defined now."""
    return [row for row in rows if row["settings"] == settings(model, task, curriculum, row["seed"])]


def markdown(found: Found, curriculum: Curriculum, used: Sequence[Row], picture: str) -> str:
    """The report's text."""
    first = used[0]
    head = INTRODUCTION.format(
        curriculum=curriculum,
        config=ModelUnderTest("", "").config(1),
        runs=len(used),
        threads=first["threads"],
        cores=first["cores"],
        cpu=sum(row["cpu_seconds"] for row in used),
        torch=first["torch"],
        words=MEASURED_WORDS,
        longest=LONGER * curriculum.length,
        deciding=DECIDING_LETTERS,
        held=HELD,
        guesses=", ".join(f"{1 / PROBLEMS[task].answers:.1%} of {task}" for task in found),
    )
    parts = [head, f"![Right answers by length, a panel a task]({picture})"]
    for task, learned in found.items():
        parts += [f"## `{task}`: {PROBLEMS[task].what}", table(learned, curriculum)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table(learned: Sequence[Learned], curriculum: Curriculum) -> str:
    """A line a model."""
    lengths = [round(curriculum.length * share) for share in (0.5, 1, 1.5, 2, LONGER)]
    heads = [f"right after {length}" for length in lengths]
    costs = ("weights", "multiply-adds", "in sequence", "letters seen", "CPU, s", "ms a step")
    lines = [("model", "what", "seeds", *heads, "holds to", *costs)]
    for each in learned:
        row = each.rows[0]
        lines.append(
            (
                f"`{each.under_test.name}`",
                each.under_test.what,
                str(len(each.rows)),
                *(spread(each.right_after(length), ".1%") for length in lengths),
                spread([held_to(row["right"]) for row in each.rows], ".0f"),
                f"{row['weights']:,}",
                f"{row['multiply_adds']:,}",
                str(each.under_test.layers_in_sequence(curriculum.length)),
                f"{row['letters']:,}",
                f"{mean(row['cpu_seconds'] for row in each.rows):.0f}",
                f"{mean(1000 * row['cpu_seconds'] / row['steps'] for row in each.rows):.0f}",
            )
        )
    return markdown_table(lines)


def plot(found: Found, curriculum: Curriculum) -> "Figure":
    """A panel a task, a line a model: right answers by letter, and where training ended."""
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
