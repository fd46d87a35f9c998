"""`melt-serve plan`: the published numbers, and sums that add up."""

import json

import pytest

from melt_serve import cli
from melt_serve.bundled import MELT


def rows(capsys, *words):
    assert cli.main(["plan", *words, "--json"]) == 0
    output = capsys.readouterr().out.splitlines()
    return {row["model"]: row for row in json.loads(output[-1])["results"]}


def test_the_papers_memory_at_32000_tokens(capsys):
    """arXiv 2605.07721 prints 27.97 GB for Ouro-1.4B and 9.49 GB for MELT-1.6B."""
    planned = rows(capsys, "ouro-1.4b", "--step-tokens", "1")
    looplm, melt = planned["LoopLM"], planned["MELT, token mode"]
    assert (looplm["kv_per_token"], melt["kv_per_token"]) == (786_432, 196_608)
    assert looplm["kv"] == 786_432 * 32_000 and melt["kv"] == 196_608 * 32_000
    assert looplm["weights"] / 1e9 == pytest.approx(2.87, abs=0.005)
    assert melt["weights"] / 1e9 == pytest.approx(3.27, abs=0.005)
    assert looplm["total"] / 1e9 == pytest.approx(27.97, rel=0.005)
    assert melt["total"] / 1e9 == pytest.approx(9.49, rel=0.01)


def test_a_melts_rows_do_not_grow_with_the_loops_and_fp8_halves_them(capsys):
    for loops in (1, 4, 32):
        planned = rows(capsys, "--loops", str(loops), "--kv-dtype", "fp8")
        assert planned["MELT, token mode"]["kv_per_token"] == 98_304
        assert planned["LoopLM"]["kv_per_token"] == 98_304 * loops
        assert planned["plain transformer"]["kv_per_token"] == 98_304


def test_chunk_mode_adds_the_open_chunk_of_every_request(capsys):
    """With C=64 and T=4 at 32,000 tokens, 3.98 times less KV than the LoopLM instead of 4."""
    planned = rows(capsys, "--chunk-size", "64", "--requests", "3")
    token, chunk, looplm = (planned[name] for name in ("MELT, token mode", "MELT, chunk mode", "LoopLM"))
    assert chunk["open_chunk"] == 3 * 64 * 196_608 and token["open_chunk"] == 0
    assert chunk["kv"] == token["kv"] + 3 * chunk["open_chunk"]
    assert round(looplm["kv"] / chunk["kv"], 2) == 3.98


def test_what_fits_is_what_the_rest_of_the_memory_holds(capsys):
    planned = rows(capsys, "--device-memory", "24", "--context", "8192", "--step-tokens", "2048")
    for row in planned.values():
        request = row["kv_per_token"] * 8192 + row["open_chunk"]
        rest = int(0.92 * 24 * 10**9) - row["weights"] - row["transient"] - row["working"]
        assert 1.5e9 < row["working"] < 3e9
        assert row["fits"] * request <= rest < (row["fits"] + 1) * request
    assert planned["MELT, token mode"]["transient"] == 24 * 2048 * 2048 * 2
    assert rows(capsys, "--device-memory", "1")["LoopLM"]["fits"] == 0


def test_more_fits_where_vllm_may_take_more(capsys):
    words = ("--device-memory", "24", "--context", "2048", "--gpu-memory-utilization")
    less, more = (rows(capsys, *words, share)["LoopLM"] for share in ("0.5", "1"))
    assert less["fits"] < more["fits"] and less["working"] == more["working"]
    assert cli.main(["plan", *words, "2"]) == 2
    assert "is a share" in capsys.readouterr().err


def test_a_checkpoint_is_planned_by_its_own_config(capsys):
    planned = rows(capsys, str(MELT), "--kv-dtype", "bfloat16")
    assert planned["MELT, token mode"]["kv_per_token"] == 2 * 192 * 2
    assert planned["LoopLM"]["kv_per_token"] == 4 * 2 * 192 * 2


@pytest.mark.parametrize(
    ("model", "says"), [("./nowhere", "published shapes are ouro-1.4b"), (None, "a 'llama' model")]
)
def test_an_unknown_model_is_one_line(model, says, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["plan", model or str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(("flag", "field"), [("--loops", "total_ut_steps"), ("--chunk-size", "chunk_size")])
def test_a_load_that_no_melt_can_have_is_one_line(flag, field, capsys):
    assert cli.main(["plan", flag, "1000000"]) == 2
    error = capsys.readouterr().err
    assert f"{field} must be at most" in error and error.count("\n") == 1


def test_a_checkpoint_with_loops_for_efforts_is_planned_at_fewer(capsys):
    """Those of the bundled one are more than one loop."""
    assert cli.main(["plan", str(MELT), "--loops", "1"]) == 0
    assert "MELT, chunk mode" in capsys.readouterr().out
