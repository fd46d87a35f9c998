"""vLLM's GPU runner serves MELT right, its start passes, and a step launches few kernels: the tests of `gpu_runner.py`
and `gpu_kernels.py`, in a process of their own."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

CASES = [str(Path(__file__).with_name(name)) for name in ("gpu_runner.py", "gpu_kernels.py")]
GPU_RUNNER = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def test_the_gpu_runner_passes_on_a_cpu(tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.engine.triton_on_cpu", f"--junitxml={report}"]
    run = subprocess.run([*command, *CASES], env={**os.environ, **GPU_RUNNER}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= 20 and suite.get("skipped") == "0"
