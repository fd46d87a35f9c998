"""What is deployed fits together, and fits the schemas of those who read it."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from melt_serve.serve import SAFE_DEFAULTS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
USER = 10001
DRAIN = int(SAFE_DEFAULTS["--shutdown-timeout"])
KUBERNETES = "1.30"


def run(name: str, *words: str | Path) -> str:
    program = shutil.which(name)
    if program is None:
        pytest.fail(f"this needs {name}: make programs")
    ran = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module", params=["base", "gpu"])
def objects(request):
    """What `kubectl apply -k` would send, by kind."""
    built = list(yaml.safe_load_all(run("kubectl", "kustomize", DEPLOY / "kubernetes" / request.param)))
    found = {each["kind"]: each for each in built}
    assert len(found) == len(built) == 6
    return found


def test_kubernetes_takes_every_object(objects):
    for each in objects.values():
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    broken = {**objects["Service"], "spec": {"ports": "none"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_pods_are_probed_where_they_listen_and_found_by_service_and_budget(objects):
    pod = objects["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert {int(port) for port in re.findall(r"^EXPOSE (\d+)", dockerfile, re.MULTILINE)} == set(ports.values())
    for probe, path in (("startup", "/melt/ready"), ("readiness", "/melt/ready"), ("liveness", "/health")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "http"} and "http" in ports
    assert re.findall(r"r\.urlopen\('http://127\.0\.0\.1:(\d+)(\S+)'", dockerfile) == [("8000", "/melt/ready")] * 2
    assert [port["targetPort"] for port in objects["Service"]["spec"]["ports"]] == ["http"]
    labels = pod["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["selector"].items() <= labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["http"])


def test_pods_have_no_rights_they_do_not_need(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == USER
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"/tmp", "/home/melt/.cache"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert container["image"].rpartition(":")[2].startswith(version())


def test_requests_have_the_time_to_end(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    away = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert container["args"][-2:] == ["--shutdown-timeout", str(DRAIN)]
    assert pod["terminationGracePeriodSeconds"] > away + DRAIN
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert int(compose["services"]["melt-serve"]["stop_grace_period"].removesuffix("s")) > DRAIN
    unit = (DEPLOY / "systemd" / "melt-serve.service").read_text()
    assert int(re.search(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)[1]) > DRAIN


def test_the_autoscaler_asks_for_a_number_that_the_adapter_makes_of_one_that_alerts_use(objects):
    (metric,) = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes" / "adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    series = rule["seriesQuery"].partition("{")[0]
    assert series in (DEPLOY / "prometheus" / "alerts.yml").read_text()  # whose names are tried on a server


def test_compose_fits_its_schema_and_the_image():
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).is_dir(), volume
    assert services["melt-serve"]["image"] == f"melt-serve:{version()}"


def test_systemd_takes_the_unit(tmp_path):
    unit = (DEPLOY / "systemd" / "melt-serve.service").read_text()
    (tmp_path / "melt-serve.service").write_text(re.sub(r"(?<=^ExecStart=)\S+", "/bin/true", unit, flags=re.MULTILINE))
    run("systemd-analyze", "verify", "--man=no", tmp_path / "melt-serve.service")


def test_the_images_versions_have_hashes_and_fit_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {}
    for line in (DEPLOY / "requirements.txt").read_text().replace("\\\n", "").splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
            name, _, pinned_to = pin.partition("==")
            pinned[canonicalize_name(name)] = pinned_to
    for each in map(Requirement, [*project["dependencies"], *extras["cpu"]]):
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), f"{each}: remake deploy/requirements.txt"
    assert f"torch=={pinned['torch']}" in (ROOT / "Makefile").read_text()
    (builds_with,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert Requirement(builds_with).specifier.contains(pinned["setuptools"])  # the package is built in the image
    assert f"vllm-openai:v{extras['gpu'][0].partition('==')[2]}" in (ROOT / "Dockerfile").read_text()


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
