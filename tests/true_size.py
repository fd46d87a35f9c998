"""What a server on a CPU takes at Ouro-1.4B's true size: `python -m tests.true_size FOLDER [flags of the server]`.

The weights are random and written into FOLDER once (2.9 GB), the tokenizer is a small one. No test: it takes minutes.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from openai import OpenAI
from safetensors.torch import save_file

from melt_serve.config import LoopLMConfig, weight_shapes
from melt_serve.server_process import free_port, running
from tests.ouro_files import BASE_TEMPLATE, PUBLISHED_OURO, tokenizer_of

PROMPTS = 64, 256
LOOPS = 1, 4
GENERATED = 16
ROUNDS = 2


def main() -> None:
    """Write the checkpoint if it is not there, serve it, and print what was measured."""
    folder = Path(sys.argv[1])
    if not (folder / "model.safetensors").exists():
        write(folder)
    port, started = free_port(), time.monotonic()
    words = [sys.executable, "-m", "melt_serve.cli", "serve", str(folder), "--port", str(port), *sys.argv[2:]]
    with tempfile.TemporaryDirectory() as place, running(words, port, Path(place) / "log") as server:
        print(f"ready after {time.monotonic() - started:.0f} s")
        print(next((line for line in (Path(place) / "log").read_text().splitlines() if "on this CPU" in line), ""))
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        seconds(client, 16, 2, 4)  # warms up
        for loops in LOOPS:
            for prompt in PROMPTS:
                taken = sorted(seconds(client, prompt, 1, loops) for _ in range(ROUNDS))
                print(f"{loops} loops, prompt of {prompt}: {taken[0]:.2f} to {taken[-1]:.2f} s")
            rates = []
            for _ in range(ROUNDS):
                one, many = seconds(client, 16, 1, loops), seconds(client, 16, 1 + GENERATED, loops)
                rates.append(GENERATED / (many - one))
            print(f"{loops} loops: {min(rates):.2f} to {max(rates):.2f} tokens a second")
        held = sum(each.memory_full_info().pss for each in psutil.Process().children(recursive=True))
        print(f"all processes hold {held / 1e9:.1f} GB")


def write(folder: Path) -> None:
    """Write a checkpoint of Ouro-1.4B's published config, with random weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_of(BASE_TEMPLATE).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED_OURO, indent=2))
    torch.manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else 0.02 * torch.randn(shape).bfloat16()
        for name, shape in weight_shapes(LoopLMConfig(**PUBLISHED_OURO))
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def seconds(client: OpenAI, prompt: int, tokens: int, loops: int) -> float:
    """Return how long a request takes, with a prompt that nobody has asked before."""
    ids = [random.randrange(5, 16) for _ in range(prompt)]
    started = time.monotonic()
    client.completions.create(
        model=client.models.list().data[0].id,
        prompt=ids,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"loops": loops}},
    )
    return time.monotonic() - started


if __name__ == "__main__":
    main()
