"""The site of the documents is built, strictly: every page, every link between them, every docstring's reference."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[1]
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    pages = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}
    assert {
        "index.html",
        "serving/index.html",
        "melt_serve/engine/index.html",
        "CONTRIBUTING/index.html",
    } <= pages.keys()
    assert "token_sequential" in pages["reference/modeling/index.html"], "of a docstring"
    assert not {name: found for name, page in pages.items() if (found := LOADED.findall(page))}


def test_a_link_on_the_site_is_a_link_between_pages(site):
    page = (site / "melt_serve" / "engine" / "index.html").read_text()
    assert 'href="../../engine/"' in page, "docs/engine.md"
    assert 'href="../melt_serve/engine/#the-serving-contract"' in (site / "engine" / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("[a](docs/serving.md#security) [b](melt_serve/engine/README.md#depth) `[c](nowhere.md)`", False),
        (
            "[a](docs/serving.md#security) [b](melt_serve/engine/README.md) `[c](nowhere.md)` [d](docs/hooks.py)",
            True,
        ),
        ("[a](docs/nowhere.md)", False),
        ("![a](docs/results/nowhere.svg)", False),
    ],
)
def test_a_link_that_leads_nowhere_fails(text, right, tmp_path, monkeypatch):
    """A small repository with a README of these words, built with the settings of the true one."""
    for name, words in {
        "README.md": f"# Home\n\n{text}\n",
        "melt_serve/config.py": "",
        "melt_serve/engine/README.md": "# Engine\n",
        "tests/README.md": "# Tests\n",
        "docs/serving.md": "# Serving\n\n## Security\n",
        "docs/hooks.py": (ROOT / "docs" / "hooks.py").read_text(),
        "mkdocs.yml": (ROOT / "mkdocs.yml").read_text().split("\nplugins:")[0],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(words)
    validation = "\nvalidation:\n  links: {not_found: warn, anchors: warn}\n"
    assert all(line in (ROOT / "mkdocs.yml").read_text() for line in ("strict: true", "not_found: warn, anchors: warn"))
    with (tmp_path / "mkdocs.yml").open("a") as file:
        file.write(validation)
    settings = load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    if right:
        build(settings)
        assert "nowhere" in (tmp_path / "site" / "index.html").read_text(), "code is left as it is"
    else:
        with pytest.raises(Abort):
            build(settings)
