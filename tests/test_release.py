"""The wheel and the sdist: what is in them, and that the wheel installs and serves where there is no checkout."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from melt_serve.server_process import free_port, running
from tests.api.test_page import QUESTION

ROOT = Path(__file__).parents[1]
CITATION = ROOT / "CITATION.cff"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins", "vllm.endpoint_plugins")
NOT_INSTALLED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".venv", ".git", ".*_cache", "runs", "build")

WHERE_IT_LIES = f"""
import importlib.metadata, json, melt_serve
found = [each for each in importlib.metadata.distributions() if each.name.replace("-", "_") == "melt_serve"]
plugins = [point for group in {GROUPS} for point in importlib.metadata.entry_points(group=group)]
ours = [point for point in plugins if point.name == "melt_serve"]
print(json.dumps([melt_serve.__file__, *(str(each.locate_file("")) for each in found),
                  *(str(point.dist.locate_file("")) for point in ours)]))
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """Build as a front end does, by the hook of pyproject's own backend: here without its isolation, so offline."""
    target.mkdir(exist_ok=True)
    words = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    built = subprocess.run([sys.executable, "-c", words], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target / built.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_changelog_and_citation_are_of_this_version():
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.citation-file-format", CITATION]
    checked = subprocess.run(schema, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    cited = yaml.safe_load(CITATION.read_text())
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[:2] == ["## Unreleased", f"## {VERSION} ({cited['date-released']})"]
    assert cited["version"] == VERSION


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    checkout = tmp_path_factory.mktemp("release") / "checkout"
    shutil.copytree(ROOT, checkout, ignore=NOT_INSTALLED, symlinks=True)
    return build("sdist", checkout, checkout.parent / "dist")


@pytest.fixture(scope="module")
def wheel(sdist):
    """Built from the sdist, as pip does where it finds no wheel."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return build("wheel", sdist.parent / f"melt_serve-{VERSION}", sdist.parent)


def test_the_sdist_has_what_the_wheel_needs_and_builds_the_same(sdist, wheel):
    with tarfile.open(sdist) as archive:
        inside = {each.name.partition("/")[2].split("/")[0] for each in archive if each.isfile()}
    built = {"PKG-INFO", "melt_serve.egg-info", "setup.cfg"}
    assert inside - built == {"LICENSE", "MANIFEST.in", "README.md", "melt_serve", "pyproject.toml"}
    direct = build("wheel", sdist.parents[1] / "checkout", sdist.parent / "direct")
    assert contents(direct) == contents(wheel)


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    """But the folders' READMEs, which are for those who read the code."""
    package = ROOT / "melt_serve"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "README.md" or package / "checkpoints" in path.parents
    }
    inside = contents(wheel)
    facts = f"melt_serve-{VERSION}.dist-info"
    assert {name: digest for name, digest in inside.items() if not name.startswith(facts)} == wanted
    written = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert {name.removeprefix(f"{facts}/") for name in inside if name.startswith(facts)} == written


@pytest.fixture(scope="module")
def installed(wheel):
    """A new environment with the wheel. Dependencies are links to those of this one, which would take minutes.

    What says where this checkout lies is left out of them, or its entry points would be found, too.
    """
    home = wheel.parents[1] / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    for each in Path(sysconfig.get_path("purelib")).iterdir():
        if not each.name.startswith(("melt_serve", "__editable__", "__pycache__")):
            (site / each.name).symlink_to(each)
    return home


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder outside of the checkout, to which no variable leads either."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_package_plugins_and_command_are_the_wheels(installed, elsewhere):
    run = [installed / "bin" / "python", "-c", WHERE_IT_LIES]
    places = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert len(places) == 2 + len(GROUPS) and all(Path(place).is_relative_to(installed) for place in places)
    words = [installed / "bin" / "melt-serve", "--version"]
    assert subprocess.run(words, capture_output=True, text=True).stdout.startswith(f"melt-serve {VERSION} (vLLM ")


def answer(url: str, loops: int) -> str:
    body = {
        "model": "melt-demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "vllm_xargs": {"loops": loops},
    }
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=60) as response:
        said = json.load(response)
    assert said["usage"]["loops"]["max"] == loops
    return said["choices"][0]["message"]["content"]


def test_the_installed_wheel_serves_at_two_depths(installed, elsewhere):
    port = free_port()
    command = [str(installed / "bin" / "melt-serve"), "serve", "--port", str(port), "--enforce-eager"]
    memory = ["--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "768"]
    clean = {"PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    with running([*command, *memory], port, elsewhere / "log.txt", ready="/melt/ready", environment=clean) as server:
        assert (answer(server.url, 2), answer(server.url, 4)) == ("In Hana Gus Bern.", "In Bern.")
        with urllib.request.urlopen(f"{server.url}/melt", timeout=10) as page:
            assert b"<title>melt-serve</title>" in page.read()
