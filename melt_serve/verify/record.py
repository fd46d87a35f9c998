"""What a verification found: checks with their verdicts, as a table on the screen and as a file."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

from melt_serve.terminal import columns, plain

SCHEMA = 1
"""Raised when a field of the file changes its meaning."""

Verdict = Literal["pass", "FAIL", "skipped"]


class VerifyError(ValueError):
    """What was asked for cannot be verified; the message names it and the remedy."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        measured: what was seen; where it was skipped, why.
        expected: what it is held against.
        numbers: what was measured, for programs.
        part: which server or measurement it belongs to.
    """

    name: str
    verdict: Verdict
    measured: str
    expected: str = "-"
    numbers: Mapping[str, object] = field(default_factory=dict)
    part: str = ""

    @classmethod
    def judge(cls, name: str, right: bool, measured: str, expected: str, **numbers: object) -> Self:
        """Return a check that passed or failed."""
        return cls(name, "pass" if right else "FAIL", measured, expected, numbers)

    @classmethod
    def skip(cls, name: str, reason: str) -> Self:
        """Return a check that could not be made."""
        return cls(name, "skipped", reason)


@dataclass(frozen=True)
class Certificate:
    """All checks of a run.

    Attributes:
        command: the command line.
        date: of its end, as 2026-11-28.
        device: the name of what the server ran on.
        kind: `cuda` or `cpu`; empty if no server started.
        versions: of Python and of what computes, by name.
        checkpoint: its name on the hub, or of its folder.
        revision: its commit on the hub, or what its files add up to; empty in files of before.
    """

    command: str
    date: str
    device: str
    kind: str
    versions: Mapping[str, str]
    checkpoint: str
    checks: Sequence[Check]
    schema: int = SCHEMA
    revision: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and something was checked."""
        verdicts = {check.verdict for check in self.checks}
        return "FAIL" not in verdicts and "pass" in verdicts

    @property
    def named(self) -> str:
        """The checkpoint and, where it is known, its revision."""
        return f"{self.checkpoint}@{self.revision[:12]}" if self.revision else self.checkpoint

    @property
    def counts(self) -> str:
        """How many checks passed, failed and were skipped, in words."""
        verdicts = Counter(check.verdict for check in self.checks)
        return f"{verdicts['pass']} passed, {verdicts['FAIL']} failed, {verdicts['skipped']} skipped"

    def write(self, path: Path) -> None:
        """Write the file that `read` reads."""
        path.write_text(json.dumps(plain(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            VerifyError: it is no such file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise VerifyError(f"{path} has schema {content['schema']}, this melt-serve reads {SCHEMA}: run it anew")
            checks = [Check(**check) for check in content["checks"]]
            facts = {each.name: content[each.name] for each in fields(cls) if each.name in content}
            return cls(**{**facts, "checks": checks})
        except OSError as error:
            raise VerifyError(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, VerifyError):
                raise
            raise VerifyError(f"{path} is no file that `melt-serve verify --json` wrote ({error!r})") from None


def line(check: Check) -> str:
    """Return what is shown as soon as a check is made."""
    return f"{check.verdict:<8}{check.part}, {check.name}: {check.measured}"


def table(checks: Sequence[Check]) -> str:
    """Show all checks in columns."""
    head = ("part", "check", "verdict", "measured", "expected")
    lines = [(check.part, check.name, check.verdict, check.measured, check.expected) for check in checks]
    return columns([head, *lines], left=len(head))
