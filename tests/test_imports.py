"""The model, its training and its kernels stand without vLLM."""

import subprocess
import sys

IMPORT_WITHOUT_VLLM = """
import importlib, pkgutil, sys

sys.modules["vllm"] = None
import melt_serve

for name in ("modeling", "train", "kernels"):
    package = importlib.import_module(f"melt_serve.{name}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_modeling_train_and_kernels_import_without_vllm():
    run = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_VLLM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"melt_serve.modeling.melt", "melt_serve.kernels.gate"} <= set(run.stdout.split())
