import pytest

from melt_serve.bench.worker import QUESTIONS
from tests.engine.engines import engine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """More threads make tiny engines far slower on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class EngineHere:
    """A bench's engine on random weights without a process of its own: as real, asked the same, started sooner."""

    def __init__(self, folder, checkpoint, arguments):
        checkpoint.config.save_pretrained(folder)
        self.started = engine(folder, load_format="dummy", **{"dtype": "bfloat16", **arguments})

    def __enter__(self):
        self.llm = self.started.__enter__()
        return self

    def __exit__(self, *error):
        self.started.__exit__(*error)

    def answer(self):
        """There is nothing to wait for."""

    def ask(self, what, **facts):
        return QUESTIONS[what](self.llm, **facts)


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Benches start their engines here. A round of each bench does without it, and shows that child processes work."""

    def start(name, checkpoint, arguments):
        return EngineHere(tmp_path / name, checkpoint, arguments)

    for bench in ("memory", "depth"):
        monkeypatch.setattr(f"melt_serve.bench.{bench}.Engine", start)
    return start
