"""Every link in the documents leads to a file, and to a heading in it; every path they name is there."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", ".pytest_cache", "build", "node_modules", "runs"} & {*path.relative_to(ROOT).parts}
)

FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:href|src)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
FOLDERS = (*(path.name for path in (ROOT / "melt_serve").iterdir() if path.is_dir()), "docs", "examples", "tests")
PATH = re.compile(
    rf"(?<![\w./:-])(?:{'|'.join((*FOLDERS, 'deploy', 'loadtests', 'melt_serve'))})/[\w./-]*\w(?![\w*<{{$-])"
)
MADE_BY_READERS = {"deploy/prometheus/local.yml"}


def links_of(text: str) -> list[str]:
    """Return the targets of a document's links and pictures, without those of other sites."""
    targets = [first or second for first, second in LINK.findall(FENCE.sub("", text))]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
    """Return what can follow a `#`, as GitHub makes it of headings."""
    anchors: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def fault_of(document: Path, target: str) -> str | None:
    """Return why a link of a document leads nowhere; None if it does not."""
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document
    if not file.is_relative_to(ROOT) or not file.exists():
        return f"{target}: no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors_of(file.read_text()):
        return f"{target}: no such heading"
    return None


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "architecture.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(document):
    faults = [fault for target in links_of(document.read_text()) if (fault := fault_of(document, target))]
    assert not faults, "\n".join(["", *faults])


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],  # which names what has gone
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_path_named_exists(document):
    named = set(PATH.findall(document.read_text())) - MADE_BY_READERS
    places = (ROOT, ROOT / "melt_serve", document.parent)
    missing = sorted(path for path in named if not any((place / path).exists() for place in places))
    assert not missing, "\n".join(["", *missing])


def test_links_are_judged():
    here = ROOT / "README.md"
    assert fault_of(here, "LICENSE") is None
    assert fault_of(here, "docs/nowhere.md") == "docs/nowhere.md: no such file"
    assert fault_of(here, "../elsewhere.md") == "../elsewhere.md: no such file"
    assert fault_of(here, "melt_serve/engine/README.md#the-serving-contract") is None
    assert (
        fault_of(here, "melt_serve/engine/README.md#nothing") == "melt_serve/engine/README.md#nothing: no such heading"
    )
    assert anchors_of("# A `b_c`, d!\n## Twice\n## Twice\n```\n# not one\n```\n") == {"a-b_c-d", "twice", "twice-1"}
    assert links_of("[a](x.md#y) ![b](p.svg) [c](https://z)\n```\n[d](no.md)\n```\n") == ["x.md#y", "p.svg"]
