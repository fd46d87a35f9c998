"""The verdicts, on runs where what must be found is known."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from loadtests.report import Run, depths_of, judge, write
from loadtests.scenarios import SCENARIOS, Options
from loadtests.seen import Asked, Sample

GIB = 2.0**30


def step_run(loops=(1, 2, 4), seconds=20, held=lambda loops: 1000, memory=lambda loops: GIB, pace=lambda loops: loops):
    """A MELT's run of deep_loops in which all is as it should be."""
    steps = SCENARIOS["deep_loops"].steps(Options(seconds, 4, loops))
    samples, asked = [], []
    for number, depth in enumerate(loops):
        for second in range(seconds):
            at = number * seconds + second
            samples.append(Sample(at, number, 4, int(memory(depth)), 4 * held(depth), 0, 768, 4, 0, 100 * at, 0))
            asked.append(Asked(at, depth, 0.1, 0.1 + 63 * pace(depth) / 1000, 64, depth > 2))
    return Run("melt-demo", None, steps, asked, samples)


def soak_run(growth, seconds=3600):
    steps = SCENARIOS["soak"].steps(Options(seconds, 8, (1, 2)))
    # It fills its pools for a quarter of the time, and then grows by a share of itself in an hour.
    memory = [GIB * min(1, 0.8 + at / seconds) * (1 + growth * at / 3600) for at in range(seconds)]
    samples = [Sample(at, 0, 8, int(memory[at]), 8000, 0, 768, 8, 0, 100 * at, 0) for at in range(seconds)]
    return Run("melt-demo", None, steps, [Asked(1, 1, 0.1, 1, 64, True)], samples)


def failed(verdicts):
    return [verdict.what for verdict in verdicts if not verdict.holds]


def test_a_server_that_does_what_it_should_passes():
    verdicts = judge("deep_loops", [step_run()])
    assert not failed(verdicts) and len(verdicts) == 6


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"memory": lambda loops: GIB * (1 + 0.01 * loops)}, "memory of the processes, 1 to 4 loops"),
        ({"held": lambda loops: 1000 * loops}, "KV bytes a running request holds, 1 to 4 loops"),
        ({"pace": lambda loops: loops**1.5}, "time a token in proportion to loops"),
        ({"pace": lambda loops: 4}, "time a token in proportion to loops"),
    ],
)
def test_what_grows_with_loops_and_should_not_is_found(wrong, found):
    assert failed(judge("deep_loops", [step_run(**wrong)])) == [found]


def test_an_error_and_a_silent_monitor_are_found():
    run = step_run()
    run.asked[3] = replace(run.asked[3], error="APIStatusError: no")
    run.missed = 2
    errors, silent, *_ = judge("deep_loops", [run])
    assert not errors.holds and "1 of 60 requests; APIStatusError: no" in errors.found
    assert not silent.holds


@pytest.mark.parametrize(("growth", "leaks"), [(0, False), (0.005, False), (0.03, True)])
def test_a_leak_is_told_from_pools_that_fill(growth, leaks):
    assert failed(judge("soak", [soak_run(growth)])) == (["no leak"] if leaks else [])


def test_a_soak_that_is_too_short_proves_nothing():
    assert failed(judge("soak", [soak_run(0, seconds=300)])) == ["no leak"]


def test_depths_are_measured_when_the_step_before_has_ended():
    run = step_run()
    run.asked[19] = replace(run.asked[19], seconds=3.5)
    for number in (20, 21, 22):  # the second step's first seconds still hold the first one's rows
        run.samples[number] = replace(run.samples[number], kv_in_use=10**9, memory=10**12)
    one, two, _ = depths_of(run)
    assert (two.memory, two.held) == (one.memory, one.held) and two.rate == pytest.approx(100)
    assert (one.right, two.right) == (0, 0) and one.requests == 20


def test_what_a_request_holds_does_not_depend_on_when_one_looks():
    run = step_run()
    for number, sample in enumerate(run.samples):  # requests begin together, and some have just ended
        phase = number % 5
        run.samples[number] = replace(sample, kv_in_use=sample.kv_in_use * (phase + 1) / 5, running=4 if phase else 1)
    assert [depth.held for depth in depths_of(run)] == [1000, 1000, 1000]


def test_the_report_is_one_file_that_loads_nothing(tmp_path):
    looplm = replace(step_run(loops=(2,)), model="looplm-demo", loops=2)
    write(tmp_path / "deep_loops.html", "deep_loops", [step_run(), looplm])
    page = (tmp_path / "deep_loops.html").read_text()
    (tmp_path / "deep_loops.svg").stat()
    loaded = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag, attributes):
            loaded.extend(
                value for name, value in attributes if name in ("src", "href") and tag in ("script", "link", "img")
            )

    Finder().feed(page)
    assert not loaded and page.count("<svg") == 3 and "melt-demo" in page and "looplm-demo, 2 loops" in page
