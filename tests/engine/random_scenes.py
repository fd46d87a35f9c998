"""Random scenes, and how many of them a test plays beside those that every engine must stand."""

from collections.abc import Callable

from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from tests.engine.engines import RIGHT
from tests.engine.scenes import SCENES, Ask, Scene, Server

MAX_LOOPS = 6


def near_multiples() -> st.SearchStrategy[int]:
    """Draw lengths around the multiples of chunks and blocks, where cuts and shares begin and end."""
    around = st.builds(lambda of, off: max(0, 32 * of + off), st.integers(0, 6), st.integers(-2, 2))
    return around | st.integers(0, 200)


asks = st.builds(
    Ask,
    arrives=st.integers(0, 30),
    document=st.integers(0, 1),
    shared=near_multiples(),
    own=st.integers(1, 70),
    answer=st.integers(1, 70),
    continues=st.none() | st.integers(0, 4),
    seed=st.none() | st.integers(0, 3),
    n=st.sampled_from((1, 1, 1, 2)),
    loops=st.none() | st.integers(1, MAX_LOOPS),
    exit_threshold=st.sampled_from((1.0, 1.0, 1.0, 0.6, 0.85)),
    priority=st.integers(0, 2),
    penalty=st.sampled_from((0.0, 0.0, 0.5)),
    alternates=st.sampled_from((False, False, True)),
    adapter=st.none() | st.integers(0, 2),
    leaves=st.none() | st.integers(0, 60),
)
scenes = st.builds(
    Scene,
    asks=st.lists(asks, min_size=1, max_size=6).map(tuple),
    budget=st.integers(96, 512) | st.sampled_from((96, 97, 102, 128)),
    spare_blocks=st.none() | st.integers(0, 5),
    warm=st.booleans(),
    ahead=st.booleans(),
)

EVERY_RUN = settings(suppress_health_check=list(HealthCheck))
FEW = EVERY_RUN if settings.get_current_profile_name() == "long" else settings(EVERY_RUN, max_examples=2)


def plays(amount: settings) -> Callable[[Callable], Callable]:
    """Play the scenes that every kind must stand, and random ones besides."""

    def decorate(test: Callable) -> Callable:
        test = given(scene=scenes)(test)
        for scene in SCENES:
            test = example(scene=scene)(test)
        return amount(test)

    return decorate


def judge(server: Server, scene: Scene) -> None:
    """Compare every answer of the scene with the reference."""
    distances = server.distances(scene)
    note(f"by request and answer: {distances}")
    assert max(distances.values(), default=0) <= RIGHT
