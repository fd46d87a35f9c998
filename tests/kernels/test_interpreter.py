"""What the kernels' tests say of the references holds for Triton's versions, in its interpreter."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from melt_serve.kernels.dispatch import triton

HERE = Path(__file__).parent
INTERPRETER = {"TRITON_INTERPRET": "1", "MELT_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.skipif(triton is None, reason="no Triton")
def test_the_grid_passes_in_tritons_interpreter(tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--durations=0", "--durations-min=5", f"--junitxml={report}"]
    tests = [str(HERE / f"test_{what}.py") for what in ("gate", "norms", "rows", "student")]
    run = subprocess.run([*command, *tests], env={**os.environ, **INTERPRETER}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) > 60 and suite.get("skipped") == "0"
