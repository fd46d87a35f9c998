"""`melt-serve bench reference` on a CPU, tiny."""

import json

from melt_serve import cli
from melt_serve.bench.shapes import shape
from melt_serve.config import MeltConfig, kv_bytes_per_token


def test_rows_do_not_grow_with_the_loops(capsys, tmp_path):
    plot = tmp_path / "reference.svg"
    tiny = "--device cpu --loops 3,1 --batch 2 --prompt 5 --generated 4 --rounds 2".split()
    assert cli.main(["bench", "reference", *tiny, "--json", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    rows = json.loads(output.splitlines()[-1])["results"]
    assert [row["loops"] for row in rows] == [1, 3]
    # The last generated token is never fed in again.
    held = 2 * (5 + 4 - 1) * kv_bytes_per_token(MeltConfig(**shape("small")), bytes_per_value=2)
    for row in rows:
        assert row["row_bytes"] == held and row["peak_bytes"] is None and len(row["rates"]) == 2
        assert min(row["rates"]) <= row["tokens_per_second"] <= max(row["rates"])
    assert "rows the same at every depth: reached" in output and "<svg" in plot.read_text()
