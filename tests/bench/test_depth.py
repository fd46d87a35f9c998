"""`melt-serve bench depth` on real engines of a tiny shape. How fast they are is not for a test to say."""

import json
from dataclasses import replace

import pytest

from melt_serve import cli
from melt_serve.bench.depth import Options, engine_arguments, workloads
from melt_serve.bench.depth_results import Measured, Mix, Result, table
from melt_serve.config import kv_bytes_per_token

TINY = "--layers 1 --hidden 64 --loops 4,1,2 --requests 4 --prompt 40 --generated 40 --rounds 2 --json".split()
ROW = 2 * 64 * 2  # K and V, values, bytes of each
DEFAULT = Options()
MEASURED = Result("melt", 1, "token", [9.0, 11.0, 10.0], [0.3, 0.4, 0.2], 0.35, 0.01, 256, 0)


def bench(capsys, *words):
    code = cli.main(["bench", "depth", *TINY, *words])
    output = capsys.readouterr()
    assert code == 0, output.err
    report = json.loads(output.out.splitlines()[-1])
    return report, output.out


def test_a_melts_rows_are_the_same_at_every_depth_and_the_bundled_checkpoints_need_their_loops(
    capsys, tmp_path, in_this_process
):
    plot = tmp_path / "depth.svg"
    report, text = bench(capsys, "--accuracy", "20", "--exit-thresholds", "0.1", "--plot", str(plot))
    both, (mix, other) = report["results"], report["mixes"]
    rows, looplm = both[:3], both[3:]
    assert [(row["loops"], row["decode_mode"]) for row in rows] == [(1, "token"), (2, "token"), (4, "token")]
    assert [(row["model"], row["loops"], row["decode_mode"]) for row in looplm] == [
        ("looplm", t, None) for t in (1, 2, 4)
    ]
    assert [(row["kv_bytes_per_token"], row["open_chunk_bytes"]) for row in rows] == [(ROW, 0)] * 3
    assert looplm[2]["kv_bytes_per_token"] == 4 * ROW
    assert all(row["loops"] * ROW <= row["kv_bytes_per_token"] <= 4 * ROW for row in looplm)
    for row in both:
        assert min(row["rates"]) <= row["tokens_per_second"] <= max(row["rates"]) and len(row["rates"]) == 2
        assert row["latency_seconds"] > 0 and row["relative_time"] > 0
    assert rows[2]["relative_times"] == looplm[2]["relative_times"] == [1, 1]
    for name in ("melt-demo", "looplm-demo"):
        one, two, four, exits = (each for each in report["answers"] if each["checkpoint"] == name)
        assert one["right"] < two["right"] < 0.9 <= four["right"]
        assert [each["mean_loops"] for each in (one, two, four)] == [1, 2, 4]
        assert (exits["loops"], exits["exit_threshold"]) == (4, 0.1) and 1 <= exits["mean_loops"] < 4
        assert all(each["tokens_per_second"] > 0 and each["kv_bytes_per_token"] > 0 for each in (one, exits))
    assert mix["loops"] == [1, 4] and mix["goal"] is None and mix["kv_bytes_per_token"] == ROW
    assert len(mix["ratios"]) == 2 and min(mix["ratios"]) <= mix["ratio"] <= max(mix["ratios"])
    assert (mix["model"], other["model"]) == ("melt", "looplm")
    assert "half T=1, half T=4" in text and "the same at every depth: reached" in text
    assert "<svg" in plot.read_text()


def test_in_chunk_mode_only_the_open_chunk_grows_and_both_are_what_bench_memory_says(capsys, in_this_process):
    report, _ = bench(capsys, "--models", "melt", "--decode-mode", "chunk", "--mix", "2,4")
    rows, (mix,) = report["results"], report["mixes"]
    assert [row["kv_bytes_per_token"] for row in rows] == [ROW] * 3
    assert [row["open_chunk_bytes"] for row in rows] == [0, 32 * ROW, 3 * 32 * ROW]
    assert mix["loops"] == [2, 4] and report["answers"] == []
    tiny = replace(DEFAULT, layers=1, hidden=64, loops=[4], decode_mode="chunk", requests=4, prompt=40, generated=40)
    with in_this_process("tiny", tiny.checkpoint("melt"), engine_arguments(tiny, "melt")) as engine:
        memory = engine.ask("memory", prompt=40)
        # Room for all requests at once, so that none waits for another's blocks.
        assert memory["max_concurrency"] >= tiny.requests
    assert rows[2].items() >= {key: memory[key] for key in ("kv_bytes_per_token", "open_chunk_bytes")}.items()
    assert memory["kv_bytes_per_token"] == kv_bytes_per_token(tiny.checkpoint("melt").config, bytes_per_value=2)


def test_times_are_relative_to_the_depth_nearest_to_4():
    for loops, base in (([1, 2, 4, 8], 4), ([1, 2], 2), ([8, 1, 16], 1), ([3, 5], 3), ([16, 8], 8)):
        assert replace(DEFAULT, loops=loops).base == base


def test_the_mix_goes_from_1_to_8_or_as_deep_as_the_engine():
    for loops, mixed in (([1, 16], (1, 8)), ([2, 4], (1, 4)), ([1], None)):
        assert replace(DEFAULT, loops=loops, mix=None).mixed == mixed
    works = workloads(replace(DEFAULT, loops=[8, 1, 8], requests=4))
    assert works == {"T=1": [1] * 4, "T=8": [8] * 4, "mix": [1, 8, 1, 8], "all deep": [8] * 4}


def test_goals_are_held_against_the_median_round():
    mix = Mix("melt", (1, 8), 15.0, 10.0, [1.5, 1.3, 1.6], 1.4, 256)
    text = table(Measured([MEASURED, replace(MEASURED, loops=4)], [mix], []))
    assert "10.0  9.0  11.0" in text and "0.30x  0.20  0.40  0.35 reached" in text and "1.40 reached" in text
    slow, deeper = replace(MEASURED, relative_times=[0.4]), replace(MEASURED, loops=4, kv_bytes_per_token=512)
    text = table(Measured([slow, deeper], [replace(mix, ratios=[1.3])], []))
    assert "0.35 missed" in text and "1.40 missed" in text and "same at every depth: missed" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hidden", "100"], "--hidden=100 must be a multiple of 64"),
        (["--chunk-size", "4096"], "--chunk-size=4096 is more than the 2048 tokens of a step"),
        (["--decode-mode", "chunk", "--chunk-size", "48"], "--chunk-size=48 must be a multiple of 32"),
        (["--loops", "1,4", "--mix", "1,8"], "--mix=1,8 is deeper than the 4 of --loops"),
        (["--requests", "15"], "--requests=15 must be even"),
        (["--generated", "1"], "--generated=1 leaves no time between two tokens"),
        (["--loops", "9", "--accuracy", "5"], "--accuracy=5 asks the bundled checkpoints, which run at most 8 loops"),
        (["--plot", "depth.doc"], ".png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_measured_is_one_line_at_once(words, says, capsys):
    assert cli.main(["bench", "depth", *words]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--mix", "8,1"], ["--mix", "4"], ["--mix", "1,2,3"], ["--loops", "0"], ["--accuracy", "-1"]]
)
def test_flags_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "depth", *words])
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err
