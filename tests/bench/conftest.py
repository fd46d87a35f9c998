import pytest


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """More threads make tiny engines far slower on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
