"""`melt-serve bench speculation` on the bundled checkpoints. How fast they are is not for a test to say."""

import json

import pytest

from melt_serve import cli
from melt_serve.bench.speculation import Options, Round, result_of


def test_a_round_asks_all_engines_the_same_and_counts_their_drafts(capsys, tmp_path):
    size = "--models melt --requests 1,2 --questions 2 --rounds 1".split()
    plot = tmp_path / "speculation.svg"
    assert cli.main(["bench", "speculation", *size, "--plot", str(plot), "--json"]) == 0
    output = capsys.readouterr().out
    rows = json.loads(output.splitlines()[-1])["results"]
    assert [(row["drafts"], row["requests"]) for row in rows] == [
        (drafts, requests) for drafts in ("none", "ngram", "depth") for requests in (1, 2)
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0 and (row["accepted"] is None) == (row["drafts"] == "none")
        assert (row["bound"] is None) == (row["drafts"] != "depth")
        assert row["drafts"] != "none" or row["ratio"] == pytest.approx(1)
    assert "ms a token" in output and "<svg" in plot.read_text()


def test_the_bound_is_of_loops_alone():
    """Ten steps of three drafts each by one loop of four, half of which are accepted: 25 tokens for 70 loops."""
    plain, drafted = Round(10.0, 100, 0, 0, 0), Round(5.0, 100, 10, 30, 15)
    options = Options(["melt"], [1], draft_tokens=3, draft_loops=1)
    result = result_of(options, "melt", "depth", 1, {("none", 1): [plain], ("depth", 1): [drafted]})
    assert (result.ratio, result.accepted, result.tokens_per_second) == (2, 0.5, 20)
    assert result.bound == pytest.approx(25 * 4 / 70) and result.goal == pytest.approx(0.85 * result.bound)


def test_drafts_of_all_loops_are_refused(capsys):
    assert cli.main(["bench", "speculation", "--draft-loops", "4"]) == 1
    assert "--draft-loops=4 must be below the 4 loops" in capsys.readouterr().err
