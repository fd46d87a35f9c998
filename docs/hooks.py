"""What makes a site of the repository: READMEs outside of this folder become pages, links between files hold there.

On GitHub a link leads to a file. On the site it leads to that file's page, if it has one. Where it has none, as a
source file has none, its words stay and the link goes. A link to nothing is left for mkdocs to refuse.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = Path("docs")
OUTSIDE = {"README.md": "index.md"}
"""Pages by the file in the repository, where the site has them elsewhere."""
NOT_PAGES = (".venv", "build", "runs", "site", "node_modules", "tests")
CODE = r"^(?P<indent> *)(?P<fence>```|~~~).*?^(?P=indent)(?P=fence)|(?<!`)`[^`]+`(?!`)"
LINK = r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)"
CODE_OR_LINK = re.compile(f"{CODE}|{LINK}", re.DOTALL | re.MULTILINE)


def outside() -> dict[str, str]:
    """Return the path on the site of every document that lies outside of docs/, by its path in the repository."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    paths = [path for path in found if not {*NOT_PAGES, "checkpoints"} & {*path.parts} and path.parts[0] != DOCS.name]
    paths = [path for path in paths if not path.parts[0].startswith(".")] + [Path("tests/README.md")]
    return {str(path): OUTSIDE.get(str(path), str(path)) for path in paths}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside of docs/ to the site's files."""
    for source, page in outside().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    page_of = outside()
    repository = {page: source for source, page in page_of.items()}
    source = Path(repository.get(page.file.src_uri, str(DOCS / page.file.src_uri)))

    def rewritten(match: re.Match[str]) -> str:
        path, hash_mark, anchor = (match["target"] or "").partition("#")
        if not path or re.match(r"[a-z]+:", path):  # code, a heading of this page, or another site
            return match[0]
        file = os.path.normpath(source.parent / path)
        inside = os.path.relpath(file, DOCS) if Path(file).is_relative_to(DOCS) else page_of.get(file)
        if inside is not None and files.get_file_from_path(inside) is not None:
            there = os.path.relpath(inside, Path(page.file.src_uri).parent)
            return f"{match['picture']}[{match['text']}]({there}{hash_mark}{anchor})"
        return match["text"] if (ROOT / file).exists() else match[0]

    return CODE_OR_LINK.sub(rewritten, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Wrap a page's content in an element of its name, for `site.css`."""
    return f'<div class="page-{page.file.name}">{html}</div>'
