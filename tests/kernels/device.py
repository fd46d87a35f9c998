"""Where these tests run: on a GPU if there is one. Elsewhere twice, as the reference, and once more by
`test_interpreter.py` in Triton's interpreter, which only a process of its own can have."""

import pytest
import torch

from melt_serve.kernels.dispatch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"

needs_triton = pytest.mark.skipif(not TRITON, reason="runs in Triton's interpreter, by test_interpreter.py")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
