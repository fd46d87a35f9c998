"""Load on a real server, for seconds."""

import json
import signal
import subprocess
import sys
import time

LOAD = [sys.executable, "-m", "loadtests"]


def test_depths_of_a_running_server_are_measured_and_reported(server, tmp_path):
    words = [
        "deep_loops",
        "--server",
        server,
        "--loops",
        "1,4",
        "--seconds",
        "8",
        "--users",
        "3",
        "--out",
        str(tmp_path),
    ]
    ran = subprocess.run([*LOAD, *words], capture_output=True, text=True, timeout=120)
    assert ran.returncode in (0, 1), ran.stderr  # memory of so short a run may not have settled
    assert "ok      no errors: 0 of " in ran.stdout and "ok      KV bytes of a token, 1 to 4 loops" in ran.stdout
    (run,) = json.loads((tmp_path / "deep_loops.json").read_text())
    assert {asked["loops"] for asked in run["asked"]} == {1, 4}
    cut = [asked for asked in run["asked"] if asked["tokens"] != 64]
    assert not cut, cut
    deep = [asked["right"] for asked in run["asked"] if asked["loops"] == 4]
    assert sum(deep) > 0.8 * len(deep) > 0
    assert max(sample["running"] for sample in run["samples"]) == 3
    assert all(sample["memory"] > 2**28 for sample in run["samples"])
    assert "melt-demo, second by second" in (tmp_path / "deep_loops.html").read_text()


def test_what_was_seen_until_ctrl_c_is_reported(server, tmp_path):
    words = ["mixed_depth", "--server", server, "--users", "2", "--out", str(tmp_path)]
    load = subprocess.Popen([*LOAD, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(20)
    load.send_signal(signal.SIGINT)
    output, errors = load.communicate(timeout=30)
    assert load.returncode == 130 and "the report is of what there is" in errors
    assert "no errors" in output and (tmp_path / "mixed_depth.html").exists()


def test_bad_words_are_one_clear_line(tmp_path):
    for words, says in (
        (["deep_loops", "--loops", "1,x"], "'x' is not a whole number of at least 1"),
        (["deep_loops", "--server", "http://127.0.0.1:9", "--out", str(tmp_path)], "no process that listens on port 9"),
    ):
        ran = subprocess.run([*LOAD, *words], capture_output=True, text=True)
        assert ran.returncode == 2 and says in ran.stderr.splitlines()[-1]
