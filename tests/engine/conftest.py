"""One live engine for all tests that ask the same of it, one kind after another."""

from collections.abc import Iterator

import pytest

from tests.engine.engines import KINDS, Served, engine, save_melt, shared


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of one kind follow each other, so that its engine starts once; those of no kind come first."""

    def kind(item: pytest.Item) -> str:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return str(params.get("served", ""))

    items.sort(key=kind)


@pytest.fixture(scope="session")
def live() -> Iterator[dict[str, Served]]:
    """Hold the live engine by its kind, if there is one."""
    with shared:
        yield {}


@pytest.fixture
def served(
    request: pytest.FixtureRequest, live: dict[str, Served], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Serve a checkpoint of `KINDS`, with an empty prefix cache and without requests that a failed test has left."""
    if request.param not in live:
        path = tmp_path_factory.mktemp("served")
        checkpoint, options = KINDS[request.param]
        model = save_melt(path, **checkpoint)
        llm = shared.enter_context(engine(path, **{"block_size": 32, **options}))
        live[request.param] = Served(llm, model)
        shared.callback(live.clear)
    llm = live[request.param].llm
    assert llm.reset_prefix_cache()
    yield live[request.param]
    llm.llm_engine.abort_request([*llm.llm_engine.output_processor.request_states], internal=True)
