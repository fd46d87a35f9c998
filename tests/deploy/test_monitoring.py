"""Dashboard and alerts against a real Prometheus that scrapes a real server under load.

The server is short of everything, so that all that can happen does happen: its cache preempts, its queue turns away,
its steps end inside chunks, and its chunks are larger than its blocks.
"""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy import draw_panels
from deploy.draw_panels import DASHBOARD, Window, every, panels_of, series_of
from melt_serve.serve import command
from melt_serve.server_process import free_port, running
from melt_serve.task.who_is_where import questions

DEPLOY = DASHBOARD.parents[2]
PROMETHEUS = DEPLOY / "prometheus"
PROVISIONING = DEPLOY / "grafana" / "provisioning"

BOARD = json.loads(DASHBOARD.read_text())
PANELS = panels_of(BOARD)
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
SOURCE = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"][0]
CONFIG = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())

KEY = "of-the-server"
SHORT_OF_EVERYTHING = {
    "--num-gpu-blocks-override": "40",
    "--block-size": "32",
    "--max-model-len": "768",
    "--max-num-batched-tokens": "128",
    "--max-num-queued-reqs": "20",
    "--hf-overrides": '{"chunk_size": 64}',
    "--api-key": KEY,
}
LEGITIMATE_ZEROS = {"Alerts firing": "no alert is due yet", "open rows": "the bundled checkpoint decodes in token mode"}


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"this needs {name}, which is not here: apt-get install prometheus")
    return path


def load(url: str) -> None:
    """Everything that clients do, until nobody asks any more."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    asked = list(islice(questions("heldout", seed=7), 8))

    def chat(number: int, tokens: int = 150, endless: bool = True, stream: bool = False, **xargs: float):
        return client.chat.completions.create(
            model="melt-demo",
            messages=[{"role": "user", "content": asked[number % len(asked)].prompt}],
            temperature=0,
            max_tokens=tokens,
            stream=stream,
            extra_body={"ignore_eos": endless, "vllm_xargs": xargs},
        )

    def deep(number: int) -> None:
        answer = chat(number, stream=number % 2 == 0, loops=(1, 2, 4, 8)[number % 4])
        if number % 2 == 0:
            list(answer)

    def refused(number: int) -> bool:
        try:
            chat(number, tokens=40)
            return False
        except openai.InternalServerError as error:
            assert error.status_code == 503
            return True

    with ThreadPoolExecutor(16) as crowd:
        list(crowd.map(deep, range(48)))
    with ThreadPoolExecutor(30) as crowd:
        assert {True, False} == set(crowd.map(refused, range(30)))
    with ThreadPoolExecutor(4) as crowd:
        list(crowd.map(lambda number: chat(number, 64, endless=False, exit_threshold=0.5), range(16)))
    with pytest.raises(openai.BadRequestError, match="loops must be a whole number from 1 to 8"):
        chat(0, loops=99)
    hung_up = chat(0, tokens=600, stream=True)
    next(iter(hung_up))
    hung_up.close()
    for tokens in (range(10, 150), [*range(10, 110), *range(200, 240)]):  # the second leaves the first inside a chunk
        client.completions.create(model="melt-demo", prompt=list(tokens), max_tokens=4)


@dataclass(frozen=True)
class Scene:
    prometheus: str
    window: Window
    metrics: str


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A server that was under load, and the Prometheus that watched."""
    folder = tmp_path_factory.mktemp("monitoring")
    port, watching_port = free_port(), free_port()
    config = {**CONFIG, "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    flags = [word for flag in SHORT_OF_EVERYTHING.items() for word in flag]
    watch = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{watching_port}",
    ]
    with (
        running(command(["--port", str(port), *flags]), port, folder / "server.txt") as server,
        running(watch, watching_port, folder / "prometheus.txt", ready="/-/ready") as prometheus,
    ):
        time.sleep(3)  # rates need a scrape before the first request
        start = time.time()
        load(server.url)
        time.sleep(3)
        with urllib.request.urlopen(f"{server.url}/metrics") as response:
            metrics = response.read().decode()
        yield Scene(prometheus.url, Window(start, time.time() - 1, scrape_interval=1), metrics)


@pytest.mark.parametrize("words", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]])
def test_prometheus_takes_the_files_and_alerts_fire_when_they_should(words):
    result = subprocess.run([tool("promtool"), *words], cwd=PROMETHEUS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    fired = set(re.findall(r"alertname=\"(\w+)\"", (PROMETHEUS / "alerts_test.yml").read_text()))
    assert fired == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["for"] and "$labels.instance" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 80


def test_grafana_finds_its_data_source_and_its_dashboard():
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "melt-serve.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"] == "/var/lib/grafana/dashboards"
    provided = {"type": SOURCE["type"], "uid": SOURCE["uid"]}
    asked = [variable["datasource"] for variable in BOARD["templating"]["list"]]
    asked += [each["datasource"] for panel in PANELS for each in (panel, *panel["targets"])]
    assert all(source == provided for source in asked)
    assert SOURCE["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]
    assert BOARD["uid"] == "melt-serve" and BOARD["schemaVersion"] >= 41


def test_panels_have_a_place_a_unit_and_an_explanation():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in BOARD["panels"])
    ]
    assert not any(one & other for one, other in combinations(cells, 2))
    assert all(0 <= x < draw_panels.COLUMNS for cell in cells for x, _ in cell)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert len(panel["description"]) > 60, panel["title"]
        assert draw_panels.in_unit(panel["fieldConfig"]["defaults"]["unit"])(1.0)
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names), panel["title"]
        legends = {target["legendFormat"] for target in panel["targets"]}
        styled = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
        assert styled <= legends, panel["title"]


def test_every_metric_that_is_asked_for_is_on_the_servers_page(scene):
    shown = set(re.findall(r"^([\w:]+)(?=[{ ])", scene.metrics, re.MULTILINE))
    expressions = [rule["expr"] for rule in ALERTS] + [
        target["expr"] for panel in PANELS for target in panel["targets"]
    ]
    expressions += [variable["query"]["query"] for variable in BOARD["templating"]["list"]]
    asked = {name for text in expressions for name in re.findall(r"\b(?:melt_|vllm:|http_|process_)\w+", text)}
    assert len(asked) > 30 and asked <= shown


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_every_query_of_every_panel_returns_what_happened(scene, panel):
    for target in panel["targets"]:
        found = series_of({**panel, "targets": [target]}, scene.prometheus, scene.window, every(BOARD))
        values = np.concatenate([series.values for series in found]) if found else np.array([])
        assert np.isfinite(values).any(), target["expr"]
        name = target["legendFormat"] or panel["title"]
        assert np.nanmax(values) > 0 or name in LEGITIMATE_ZEROS, target["expr"]
        names = [series.name for series in found]
        assert len(set(names)) == len(names), f"{names}: the legend does not tell the lines apart"
        assert all(names) or panel["type"] == "stat", f"{names}: the legend names a label that is not there"


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_compares_what_is_there(scene, rule):
    values, comparisons = re.subn(r" (==|>) [\d.]+", "", rule["expr"])
    assert comparisons >= 1
    for expression in [values, *values.split("\nand ")]:
        answer = draw_panels.ask(scene.prometheus, expression, scene.window, at_the_end=True)
        assert any(np.isfinite(float(value)) for _, pairs in answer for _, value in pairs), expression
        assert all("instance" in labels for labels, _ in answer)


def test_prometheus_itself_can_evaluate_every_alert(scene):
    with urllib.request.urlopen(f"{scene.prometheus}/api/v1/rules") as response:
        rules = json.load(response)["data"]["groups"][0]["rules"]
    assert [(rule["name"], rule["health"]) for rule in rules] == [(rule["alert"], "ok") for rule in ALERTS]


def test_a_looplm_would_need_as_many_times_the_rows_as_loops_are_run(scene):
    def of(title: str) -> list[np.ndarray]:
        panel = next(panel for panel in PANELS if panel["title"] == title)
        return [series.values for series in series_of(panel, scene.prometheus, scene.window, every(BOARD))]

    final, _, looplm, room = of("KV rows in use, and what a LoopLM would need")
    assert np.nanmax(final) <= np.nanmax(room) == 40 * 32 * 768  # bytes a token: 2 * 6 heads of 32, float32
    busy = final > 0
    assert np.all(looplm[busy] >= final[busy]) and np.all(looplm[busy] <= 8 * final[busy])


def test_early_exits_save_the_share_of_loops_that_the_counters_say(scene):
    panel = next(panel for panel in PANELS if panel["title"] == "Loops saved by early exits")
    since_ever = re.sub(r"rate\((.*?)\[.*?\]\)", r"\1", panel["targets"][0]["expr"])
    ((_, ((_, saved),)),) = draw_panels.ask(
        scene.prometheus, draw_panels.fill(since_ever, every(BOARD)), scene.window, at_the_end=True
    )
    samples = [
        sample
        for family in text_string_to_metric_families(scene.metrics)
        if family.name == "melt_token_loops"
        for sample in family.samples
    ]
    run = sum(sample.value for sample in samples if sample.name.endswith("_sum"))
    allowed = sum(int(sample.labels["loops"]) * sample.value for sample in samples if sample.name.endswith("_count"))
    assert run < allowed and float(saved) == pytest.approx(1 - run / allowed)


def test_the_panels_can_be_drawn(scene, tmp_path, capsys):
    picture = tmp_path / "panels.png"
    minutes = (scene.window.end - scene.window.start) / 60
    words = ["--prometheus", scene.prometheus, "--out", str(picture), "--scrape-interval", "1"]
    assert draw_panels.main([*words, "--minutes", str(minutes), "--end", str(scene.window.end)]) == 0
    assert capsys.readouterr().out == f"{picture}: {len(PANELS)} panels\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert draw_panels.main(["--prometheus", "http://127.0.0.1:9", "--out", str(picture)]) == 1
    assert "no Prometheus answers at http://127.0.0.1:9" in capsys.readouterr().err
