"""What all commands of `python -m melt_serve.train` share: instant help, old names, how a session ends."""

import argparse
import os
import signal
import subprocess
import sys

import pytest

from melt_serve.train.__main__ import COMMANDS, RENAMED, main
from melt_serve.train.commands import fail, run_session
from melt_serve.train.results import add_records
from melt_serve.train.session import Paused, TrainingError
from tests.cpu_seconds import least_cpu_seconds

NAMES = ("bundled", "run", "export", "cost", "trial", "memory", "data", "ablate", "lengths")
HEAVY = "{'torch', 'transformers', 'pydantic', 'matplotlib'}"


def test_help_is_instant_and_lists_every_command():
    said, seconds = least_cpu_seconds([sys.executable, "-m", "melt_serve.train", "--help"])
    assert said.returncode == 0 and all(f"\n    {name} " in said.stdout for name in NAMES)
    assert len(COMMANDS) == len(NAMES) and seconds < 0.3


def test_the_help_of_a_command_imports_nothing_heavy():
    script = f"""
import sys
from melt_serve.train.__main__ import main
for name in {NAMES}:
    try:
        main([name, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
print(sorted({HEAVY} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.endswith("[]\n")
    assert all(f"usage: python -m melt_serve.train {name} " in said for name in NAMES)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_goes_on_working_and_says_the_new_one(old, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([old, "--help"])
    said = capsys.readouterr()
    assert said.err == f"melt_serve.train: `{old}` is called `{RENAMED[old]}` now\n"
    assert said.out.startswith(f"usage: python -m melt_serve.train {RENAMED[old]} ")


def end(with_what):
    def work(session):
        session.signal = with_what if isinstance(with_what, int) else None
        raise Paused if with_what is None or isinstance(with_what, int) else with_what

    return work


@pytest.mark.parametrize(
    ("with_what", "code", "says"),
    [
        (None, 3, "paused\n"),
        (signal.SIGINT, 130, "paused\n"),
        (signal.SIGTERM, 143, "paused\n"),
        (KeyboardInterrupt, 130, "\nstopped\n"),
    ],
)
def test_a_session_ends_with_a_code_and_one_line_that_only_the_first_process_says(
    with_what, code, says, capsys, monkeypatch
):
    assert run_session(end(with_what), 1.0, "paused", "stopped") == code
    assert capsys.readouterr().err == says
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert run_session(end(with_what), 1.0, "paused", "stopped") == code
    assert capsys.readouterr().err == ""


def test_a_session_that_does_its_work_ends_with_0(capsys):
    assert run_session(lambda session: None, 0.0, "paused", "stopped") == 0
    assert capsys.readouterr().err == ""


def test_an_error_is_one_line_that_only_the_first_process_says(capsys, monkeypatch):
    assert fail(TrainingError("no\nluck")) == 1
    assert capsys.readouterr().err == "melt_serve.train: error: no luck\n"
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert fail(TrainingError("no luck")) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("there", "found"), [([], "records"), (["rows"], "rows"), (["rows", "records"], "records")])
def test_results_of_an_older_version_are_still_found(there, found, tmp_path):
    for name in there:
        (tmp_path / f"{name}.jsonl").touch()
    parser = argparse.ArgumentParser()
    add_records(parser, tmp_path)
    assert parser.parse_args([]).records == tmp_path / f"{found}.jsonl"
    for flag in ("--records", "--rows"):
        assert str(parser.parse_args([flag, "mine.jsonl"]).records) == "mine.jsonl"
