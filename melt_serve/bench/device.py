"""Which device `--device` names."""

import torch

from melt_serve.bench.engine import BenchError


def device_of(word: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here.

    Raises:
        BenchError: there is no GPU.
    """
    if word == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device=cuda: PyTorch finds no GPU here")
    return torch.device("cuda" if word != "cpu" and torch.cuda.is_available() else "cpu")
