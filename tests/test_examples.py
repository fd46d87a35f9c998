"""Every example runs as it stands, and prints what it promises."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from melt_serve.checkpoint_check import check_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWS = {
    "depth": r"loops 2 +2\.00 loops a token +In Hana Gus Bern\.\n(.*\n)*loops 4 +4\.00 loops a token +In Bern\.\n"
    r"(.*\n)*effort high +6\.00 .*\n(.*\n)*exit threshold 0\.5 +[1-3]\.\d\d loops a token +In Bern\.\n",
    "streaming": r"reasoning +Follow Sam Leo Kim Bob Ann Rome\nanswer +In Rome\.\n\n\d+ tokens in .* 4\.00 loops",
    "structured": r"JSON by a schema: \{'place': '(Bern|Oslo|Rome)', 'sure': (True|False)\}\n"
    r"a call of a tool: move, \{'name': '(Ann|Bob)', 'place': '(Bern|Oslo)'\}\n",
    "token_loops": r"'Follow' +-?0\.\d{4} +\d +[01]\.\d\d.*\n(.*\n)+\d+ tokens, [1-3]\.\d\d loops on average\n",
    "reference_model": r"2 loops\n(.*\n)+4 loops\n +<think></think>In Rome\.\n"
    r" +<think>Follow Kim Bob Ann Rome</think>In Rome\.\n",
    "post_train": r"transition +step \d.*\n(.*\n)*alignment +step \d +loss [\d.]+\nserve it: melt-serve serve ",
}
"""What each prints, by its name."""


@pytest.fixture
def run(server, monkeypatch, capsys, tmp_path):
    """Runs an example in this process, where what it imports is there already; gives what it printed."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    monkeypatch.chdir(tmp_path)

    def call(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code
        return capsys.readouterr().out

    return call


def test_every_example_is_in_the_table_and_has_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SHOWS.keys()
    table = (EXAMPLES / "README.md").read_text()
    files = [path for path in EXAMPLES.rglob("*.*py") if path.suffix == ".py"] + [EXAMPLES / "node/chat.mjs"]
    assert not [path for path in files if f"`{path.relative_to(EXAMPLES)}`" not in table]


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_prints_what_it_promises(run, name, tmp_path):
    shown = run(name)
    assert re.search(SHOWS[name], shown), shown
    if name == "post_train":
        assert check_checkpoint(tmp_path / "runs" / "example" / "melt")


def test_the_client_of_node_streams_at_two_depths(server, tmp_path):
    shutil.copytree(EXAMPLES / "node", tmp_path / "node", ignore=shutil.ignore_patterns("node_modules"))
    words = {"cwd": tmp_path / "node", "env": {**os.environ, "OPENAI_BASE_URL": f"{server}/v1"}}
    words |= {"capture_output": True, "text": True}
    installed = subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], **words)
    assert installed.returncode == 0, installed.stderr
    done = subprocess.run(["node", "chat.mjs"], **words)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"loops 2, \d+ tokens: \(.+\) In \w+\.\nloops 4, \d+ tokens: \(Follow Kim Bob Ann Rome\) In Rome\.\n$",
        done.stdout,
    )
