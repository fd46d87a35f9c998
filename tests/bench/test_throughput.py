"""`melt-serve bench throughput` on real engines of a tiny shape. How fast they are is not for a test to say."""

import json
from dataclasses import replace

import pytest

from melt_serve import cli
from melt_serve.bench.throughput import Options, cache_bytes, work

DEFAULT = Options(8, 512, [4], ["scarce"], "token", 32, requests=32, prompt=128, generated=128, rounds=3)


def test_a_round_compares_the_same_requests_in_the_same_cache_and_shows_where_the_time_goes(capsys, tmp_path):
    size = "--layers 1 --hidden 64 --loops 2 --cache scarce --requests 8 --prompt 33 --generated 4 --rounds 2".split()
    size += ["--gate-rank", "8"]
    plot = tmp_path / "throughput.svg"
    assert cli.main(["bench", "throughput", *size, "--profile", "--plot", str(plot), "--json"]) == 0
    output = capsys.readouterr().out
    (row,) = json.loads(output.splitlines()[-1])["results"]
    # Two blocks a request, and one more that vLLM never uses but counts: of the MELT's half as large blocks, 26.
    assert (row["cache"], row["loops"], row["looplm_fits"], row["melt_fits"]) == ("scarce", 2, 6, 13)
    assert len(row["ratios"]) == 2 and min(row["ratios"]) <= row["ratio"] <= max(row["ratios"])
    assert row["melt_tokens_per_second"] > 0 and row["looplm_tokens_per_second"] > 0
    assert 0 < row["bound"] < 1 and row["goal"] is None
    melt, looplm = row["melt_profile"], row["looplm_profile"]
    assert set(melt) - set(looplm) == {"gate, matmuls", "gate, element-wise"}
    assert all(seconds > 0 for seconds in (*melt.values(), *looplm.values()))
    assert "gate, element-wise" in output and "<svg" in plot.read_text()


def test_a_scarce_cache_holds_as_many_looplm_requests_as_asked():
    """A block holds 32 tokens: 8 of them hold a request, and vLLM never uses one."""
    block = 32 * 4 * 8 * 2 * 512 * 2  # T, layers, K and V, values, bytes of each
    for fit, cache, blocks in ((2, "scarce", 17), (6, "scarce", 49), (99, "scarce", 257), (2, "plentiful", 257)):
        assert cache_bytes(replace(DEFAULT, fit=fit), cache, loops=4) == blocks * block


def test_the_bound_is_the_gates_two_matmuls_on_all_loops_but_the_first():
    """Ouro's proportions: 12.25 d^2 a layer and token, and 2 d^2 for the gate; the head runs once an answer's token.

    Of rank r, the gate's two matrices have 4 r d.
    """
    for loops in (1, 4):
        body, gate, head = 256 * 8 * 12.25 * loops, 256 * 8 * 2 * (loops - 1), 128 * 8
        assert work(DEFAULT, "looplm", loops) == (body + head) * 512**2
        assert work(DEFAULT, "melt", loops) == (body + gate + head) * 512**2
        thin = gate * 4 * 16 / (2 * 512)
        assert work(replace(DEFAULT, gate_rank=16), "melt", loops) == (body + thin + head) * 512**2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hidden", "100"], "--hidden=100 must be a multiple of 64"),
        (["--chunk-size", "4096"], "--chunk-size=4096 is more than the 2048 tokens of a step"),
        (["--gate-rank", "513"], "--gate-rank=513 is more than --hidden=512"),
        (["--decode-mode", "chunk", "--chunk-size", "48"], "--chunk-size=48 must be a multiple of 32"),
    ],
)
def test_what_cannot_be_measured_is_one_line_at_once(words, says, capsys):
    assert cli.main(["bench", "throughput", *words]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--cache", "rich"], ["--decode-mode", "tokens"]])
def test_flags_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "throughput", *words])
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err
