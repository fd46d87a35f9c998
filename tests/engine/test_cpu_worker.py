"""On a CPU the cache's memory is taken when rows are written, not at the start."""

import mmap

import psutil
import torch

from melt_serve.bench.worker import model_runner
from melt_serve.engine.cpu_worker import ZerosOnDemand
from tests.engine.engines import on

BYTES = {"dtype": torch.int8, "device": torch.device("cpu")}


def test_zeros_take_memory_when_they_are_touched():
    process = psutil.Process()
    before = process.memory_info().rss
    with ZerosOnDemand():
        rows = torch.zeros(1 << 30, **BYTES)
        assert torch.zeros(2, 3).shape == (2, 3) and torch.zeros(4, dtype=torch.int64).dtype == torch.int64
    assert process.memory_info().rss - before < 1 << 26
    rows[1 << 29] = 7
    assert not rows[: 1 << 20].any() and rows[1 << 29] == 7


@on("token")
def test_an_engines_rows_are_such_zeros(served):
    """Pages from the system begin where one begins; memory of PyTorch's own does not."""
    (storage,) = {rows.untyped_storage().data_ptr() for rows in model_runner(served.llm).kv_caches}
    assert storage % mmap.PAGESIZE == 0
    assert torch.zeros(1 << 26, **BYTES).data_ptr() % mmap.PAGESIZE
