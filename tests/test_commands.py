"""`melt-serve`'s commands: one entry for each, those that parse their own words included."""

import json
from dataclasses import dataclass

import pytest

from melt_serve import cli
from melt_serve.terminal import print_json


@pytest.mark.parametrize(("command", "says"), [("train", "ablate"), ("demo", "usage: melt-serve demo")])
def test_words_after_a_command_that_parses_its_own_reach_it(command, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and says in capsys.readouterr().out


def test_an_error_of_train_is_its_own(capsys):
    assert cli.main(["train", "run", "./nowhere.toml"]) == 1
    error = capsys.readouterr().err
    assert "nowhere.toml" in error and error.count("\n") == 1


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out.split("options:")[0]
    for command in ("chat", "demo", "serve", "train", "convert", "eval", "plan", "bench"):
        assert f"\n    {command} " in listed


@pytest.mark.parametrize("command", ["chat", "eval"])
@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "http://",
        "http://[",
        "http://a:b/v1",
        "http://a:99999/v1",
        "http://a..b/v1",
        "http://\0/v1",
    ],
)
def test_what_is_no_url_is_refused_before_it_is_asked(capsys, command, url):
    with pytest.raises(SystemExit) as refused:
        cli.main([command, "--server", url])
    assert refused.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("is not a URL such as http://localhost:8000/v1")


@dataclass
class Inner:
    seconds: float


@dataclass
class Outer:
    parts: tuple[Inner, ...]
    by_name: dict[str, Inner]

    @property
    def total(self) -> float:
        return sum(part.seconds for part in self.parts)


def test_json_holds_fields_and_properties(capsys):
    outer = Outer((Inner(1.0), Inner(2.0)), {"last": Inner(2.0)})
    print_json([outer])
    facts = {"parts": [{"seconds": 1.0}, {"seconds": 2.0}], "by_name": {"last": {"seconds": 2.0}}, "total": 3.0}
    assert json.loads(capsys.readouterr().out) == {"results": [facts]}
    print_json(outer)
    assert json.loads(capsys.readouterr().out) == facts
