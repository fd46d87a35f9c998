"""The part of the campaign that every run of the suite plays, from fixed seeds: `make faults` is the long one."""

import json
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.faults.fuzz import bodies, fields_of_routes
from tests.faults.servers import MODES, serving
from tests.faults.storm import settle, storm

BODIES = 500
"""Bodies for each of the two modes; the profile `long` does not change them, `python -m tests.faults` does."""
GROWTH = 1.2
FIXED = settings(
    max_examples=BODIES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", params=MODES)
def attacked(request, tmp_path_factory):
    with serving(request.param, tmp_path_factory.mktemp("faults") / "log.txt") as attacked:
        yield attacked


def test_no_body_is_an_error_of_the_server(attacked):
    said, routes = attacked.says(), fields_of_routes(json.loads(attacked.get("/openapi.json")))
    assert len(routes) >= 10
    before, statuses = attacked.memory(), Counter()

    @FIXED
    @given(bodies(routes))
    def no_error(request):
        path, body = request
        status, text = attacked.post(path, body)
        statuses[status] += 1
        assert 200 <= status < 500, (path, body[:500], status, text)
        assert status != 200 or '"code":5' not in text.replace(" ", ""), (path, body[:500], text[-500:])

    no_error()
    assert statuses[200] > BODIES / 20 and statuses[400] > BODIES / 4, statuses
    assert attacked.says() == said
    assert settle(attacked) == {}
    assert attacked.memory() <= GROWTH * before
    assert attacked.tracebacks() == 0


def test_a_storm_leaves_nothing_behind_and_changes_no_answer(attacked):
    said = attacked.says()
    done = storm(attacked, seconds=12, seed=1)
    assert set(done) == {"leaves at once", "leaves in the answer", "reads slowly", "wants all"}, done
    assert settle(attacked) == {}
    assert attacked.says() == said
    preempted = re.search(r"^vllm:num_preemptions_total\{.*\} (\S+)$", attacked.get("/metrics"), re.MULTILINE)
    assert float(preempted[1]) > 0, "there was room for all: this shows little"
    assert attacked.tracebacks() == 0
