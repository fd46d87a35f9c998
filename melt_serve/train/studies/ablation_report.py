"""The ablations as Markdown, plot and JSON: means over seeds with their spread, beside the paper's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from melt_serve.config import DECODE_MODES, DecodeMode
from melt_serve.train.recipe import Shape
from melt_serve.train.results import Record, check_report, markdown_table, spread, write_report
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

Written by `python -m melt_serve.train ablate --report`; read in docs/studies.md,
"Ablations". Every run post-trains the
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
    records: Sequence[Record]
    first: Sequence[Record]

    def outcomes(self, mode: DecodeMode, what: str, chunk_size: int | None = None) -> list[float]:
        """Return `kd` or `right` of every run, at the first chunk size measured or at this one."""
        return [outcome_of(record, mode, chunk_size)[what] for record in self.records]

    @property
    def ratios(self) -> list[float]:
        """KL over the first variant's with the same seed, `chunk` mode; where that is done."""
        first = {record["seed"]: outcome_of(record, "chunk", None)["kd"] for record in self.first}
        return [
            outcome_of(record, "chunk", None)["kd"] / first[record["seed"]]
            for record in self.records
            if record["seed"] in first
        ]


def outcome_of(record: Record, mode: DecodeMode, chunk_size: int | None) -> dict[str, float]:
    """Return one outcome of a run: of this decode mode, at the first chunk size or at this one."""
    return next(
        each for each in record["outcomes"] if each["mode"] == mode and chunk_size in (None, each["chunk_size"])
    )


def write_ablation_report(path: Path, studies: Studies, size: Size, records: Sequence[Record]) -> list[Path]:
    """Write `path`, and a plot and JSON beside it; return all three.

    Raises:
        StudyError: no run of these studies is done.
        OSError: see `check_report`.
    """
    check_report(path)
    found = {}
    for name, study in studies.items():
        runs = [(variant, records_of(variant, size, records)) for variant in study]
        found[name] = [Measured(variant, each, runs[0][1]) for variant, each in runs if each]
    found = {name: study for name, study in found.items() if study}
    if not found:
        raise StudyError(f"no run of size {size.name} is done yet: run the same command without --report")
    used = [record for record in records if any(record in each.records for study in found.values() for each in study)]
    sections = []
    for name, measured in found.items():
        sections += [f"## Study `{name}`", gate_table(measured) if name in GATE_STUDIES else recipe_table(measured)]
    return write_report(path, introduction(size, used), "KL to the teacher, by variant", plot(found), sections, used)


def records_of(variant: Variant, size: Size, records: Sequence[Record]) -> list[Record]:
    """Choose the runs of this variant as it is defined now."""
    return [record for record in records if record["settings"] == settings(variant, size, record["seed"])]


def introduction(size: Size, used: Sequence[Record]) -> str:
    """Say what was run and what the columns mean."""
    first = used[0]
    return INTRODUCTION.format(
        size=size,
        loops=" or ".join(map(str, size.loops)),
        runs=len(used),
        threads=first["threads"],
        cores=first["cores"],
        cpu=mean(record["cpu_seconds"] for record in used),
        torch=first["torch"],
        measured=MEASURED_LOOPS,
        teacher=first["outcomes"][0]["teacher_right"],
    )


def recipe_table(study: Sequence[Measured]) -> str:
    """Format a study of recipes, a line a variant, and one more for every other chunk size it is served with."""
    lines = [("variant", "what", "seeds", "C", *OUTCOME_HEADS, "KL to first", "the paper")]
    for each in study:
        chunk_sizes = sorted({outcome["chunk_size"] for record in each.records for outcome in record["outcomes"]})
        for chunk_size in chunk_sizes:
            facts = (str(len(each.records)), "whole" if chunk_size == WHOLE_SEQUENCE else str(chunk_size))
            shown = (
                *outcome_cells(each, chunk_size),
                spread(each.ratios, ".2f") if chunk_size == chunk_sizes[0] else "",
            )
            lines.append((f"`{each.variant.name}`", each.variant.what, *facts, *shown, each.variant.paper))
    return markdown_table(lines)


def gate_table(study: Sequence[Measured]) -> str:
    """Format a study of gates, a line a variant with what its gate costs."""
    lines = [("gate", "what", "weights", "multiply-adds", "seeds", *OUTCOME_HEADS, "KL to first", "the paper")]
    for each in study:
        multiply_adds = each.variant.gate_multiply_adds(Shape().hidden_size, MEASURED_LOOPS)
        facts = (f"{each.records[0]['gate_weights']:,}", f"{multiply_adds:,}", str(len(each.records)))
        shown = (*outcome_cells(each), spread(each.ratios, ".2f"))
        lines.append((f"`{each.variant.name}`", each.variant.what, *facts, *shown, each.variant.paper))
    return markdown_table(lines)


def outcome_cells(each: Measured, chunk_size: int | None = None) -> list[str]:
    """Format KL in both decode modes, and right replies in both."""
    return [
        spread(each.outcomes(mode, what, chunk_size), form)
        for what, form in (("kd", ".4f"), ("right", ".1%"))
        for mode in DECODE_MODES
    ]


def plot(found: Found) -> "Figure":
    """Draw KL in both decode modes: a panel a study, a line a variant, a dot a seed."""
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
