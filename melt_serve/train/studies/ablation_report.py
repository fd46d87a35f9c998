"""The ablations as Markdown, plot and JSON: means over seeds with their spread, beside the paper's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from melt_serve.config import DECODE_MODES, DecodeMode
from melt_serve.train.recipe import Shape
from melt_serve.train.results import Row, markdown_table, spread, write_json
from melt_serve.train.session import StudyError
from melt_serve.train.studies.ablation_run import MEASURED_LOOPS, settings
from melt_serve.train.studies.ablations import WHOLE_SEQUENCE, Size, Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Studies = Mapping[str, Sequence[Variant]]
Found = Mapping[str, Sequence["Measured"]]
GATE_STUDIES = ("gates", "compressed", "paper-gates")
OUTCOME_HEADS = [f"{what}, `{mode}`" for what in ("KL", "right") for mode in DECODE_MODES]
INTRODUCTION = """\
# Ablations

Written by `python -m melt_serve.train ablate --report`; read in README.md, "Ablations". Every run post-trains the
bundled `looplm-demo` (one teacher for all), at size `{size.name}`: {size.steps[0]} + {size.steps[1]} steps of phases 1
and 2 with {size.batch} questions each at T = {loops}, C = {size.chunk_size} where nothing else is said, float32.
Those of `compressed` train nothing: they are the bundled `melt-demo` with a cheaper gate, served with its own C. {runs}
runs, {threads} thread(s) on {cores} CPU cores, {cpu:.0f} s of CPU time each in the mean, torch {torch}.
A seed is that of the
data's order and of the fresh gate; variants of a seed see the same questions in the same order.

- **KL**: of the teacher's and the student's answer at the last loop, T = {measured}, in nats a token of the reply, the
  right tokens before it given; {size.questions} held-out questions of 16 sentences. The smaller, the better.
- **right**: the share of replies that greedy decoding gives word for word. The teacher's: {teacher:.1%}.
- Both as served in `token` and in `chunk` decode mode. Mean over seeds (lowest to highest).
- **multiply-adds**: of the gate's matrices, for one token in one layer over T = {measured} loops
  (the first has no gate).
- **KL to first**: over that of the first variant in the table with the same seed, `chunk` mode.
"""


@dataclass(frozen=True)
class Measured:
    """A variant with its runs, one a seed.

    Attributes:
        first: the runs of the study's first variant, to be held against.
    """

    variant: Variant
    rows: Sequence[Row]
    first: Sequence[Row]

    def outcomes(self, mode: DecodeMode, what: str, chunk_size: int | None = None) -> list[float]:
        """`kd` or `right` of every run, at the first chunk size measured or at this one."""
        return [outcome_of(row, mode, chunk_size)[what] for row in self.rows]

    @property
    def ratios(self) -> list[float]:
        """KL over the first variant's with the same seed, `chunk` mode; where that is done."""
        first = {row["seed"]: outcome_of(row, "chunk", None)["kd"] for row in self.first}
        return [outcome_of(row, "chunk", None)["kd"] / first[row["seed"]] for row in self.rows if row["seed"] in first]


def outcome_of(row: Row, mode: DecodeMode, chunk_size: int | None) -> dict[str, float]:
    """One outcome of a run: of this decode mode, at the first chunk size or at this one."""
    return next(each for each in row["outcomes"] if each["mode"] == mode and chunk_size in (None, each["chunk_size"]))


def write_report(path: Path, studies: Studies, size: Size, rows: Sequence[Row]) -> list[Path]:
    """Write `path`, and a plot and JSON beside it; gives all three.

    Raises:
        StudyError: no run of these studies is done, or matplotlib is missing.
    """
    found = {}
    for name, study in studies.items():
        runs = [(variant, rows_of(variant, size, rows)) for variant in study]
        found[name] = [Measured(variant, each, runs[0][1]) for variant, each in runs if each]
    found = {name: study for name, study in found.items() if study}
    if not found:
        raise StudyError(f"no run of size {size.name} is done yet: run the same command without --report")
    used = [row for row in rows if any(row in each.rows for study in found.values() for each in study)]
    try:
        figure = plot(found)
    except ImportError:
        raise StudyError("--report needs matplotlib: pip install matplotlib") from None
    files = [path, path.with_suffix(".svg"), path.with_suffix(".json")]
    path.write_text(markdown(found, size, used, files[1].name), encoding="utf-8")
    figure.savefig(files[1])
    write_json(files[2], used)
    return files


def rows_of(variant: Variant, size: Size, rows: Sequence[Row]) -> list[Row]:
    """The runs of this variant as it is defined now."""
    return [row for row in rows if row["settings"] == settings(variant, size, row["seed"])]


def markdown(found: Found, size: Size, used: Sequence[Row], picture: str) -> str:
    """The report's text."""
    first = used[0]
    head = INTRODUCTION.format(
        size=size,
        loops=" or ".join(map(str, size.loops)),
        runs=len(used),
        threads=first["threads"],
        cores=first["cores"],
        cpu=mean(row["cpu_seconds"] for row in used),
        torch=first["torch"],
        measured=MEASURED_LOOPS,
        teacher=first["outcomes"][0]["teacher_right"],
    )
    parts = [head, f"![KL to the teacher, by variant]({picture})"]
    for name, study in found.items():
        parts.append(f"## Study `{name}`")
        parts.append(gate_table(study) if name in GATE_STUDIES else recipe_table(study))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def recipe_table(study: Sequence[Measured]) -> str:
    """A line a variant, and one more for every other chunk size it is served with."""
    lines = [("variant", "what", "seeds", "C", *OUTCOME_HEADS, "KL to first", "the paper")]
    for each in study:
        chunk_sizes = sorted({outcome["chunk_size"] for row in each.rows for outcome in row["outcomes"]})
        for chunk_size in chunk_sizes:
            facts = (str(len(each.rows)), "whole" if chunk_size == WHOLE_SEQUENCE else str(chunk_size))
            shown = (
                *outcome_cells(each, chunk_size),
                spread(each.ratios, ".2f") if chunk_size == chunk_sizes[0] else "",
            )
            lines.append((f"`{each.variant.name}`", each.variant.what, *facts, *shown, each.variant.paper))
    return markdown_table(lines)


def gate_table(study: Sequence[Measured]) -> str:
    """A line a variant with what its gate costs."""
    lines = [("gate", "what", "weights", "multiply-adds", "seeds", *OUTCOME_HEADS, "KL to first", "the paper")]
    for each in study:
        multiply_adds = each.variant.gate_multiply_adds(Shape().hidden_size, MEASURED_LOOPS)
        facts = (f"{each.rows[0]['gate_weights']:,}", f"{multiply_adds:,}", str(len(each.rows)))
        shown = (*outcome_cells(each), spread(each.ratios, ".2f"))
        lines.append((f"`{each.variant.name}`", each.variant.what, *facts, *shown, each.variant.paper))
    return markdown_table(lines)


def outcome_cells(each: Measured, chunk_size: int | None = None) -> list[str]:
    """KL in both decode modes, right replies in both."""
    return [
        spread(each.outcomes(mode, what, chunk_size), form)
        for what, form in (("kd", ".4f"), ("right", ".1%"))
        for mode in DECODE_MODES
    ]


def plot(found: Found) -> "Figure":
    """KL in both decode modes: a panel a study, a line a variant, a dot a seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    longest = max(len(study) for study in found.values())
    figure = Figure(figsize=(4.5 * len(found), 1.2 + 0.32 * longest), layout="constrained")
    for axes, (name, study) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for mode, marker, raised in zip(DECODE_MODES, "os", (0.12, -0.12), strict=True):
            dots = [(value, place - raised) for place, each in enumerate(study) for value in each.outcomes(mode, "kd")]
            axes.scatter(*zip(*dots, strict=True), marker=marker, s=18, alpha=0.7, label=f"`{mode}` mode")
        axes.set(title=name, xlabel="KL to the teacher, nats a token", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(study)), [each.variant.name for each in study])
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
