"""A post-training small enough for tests: a teacher of the demo's kind, chats, and a recipe in a file."""

import json
import subprocess
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from melt_serve.modeling import LoopLMConfig, OuroForCausalLM
from melt_serve.task.tokenizer import VOCABULARY, build_tokenizer
from melt_serve.task.who_is_where import questions
from tests.tiny_models import enliven

RECIPE = """
kind = "post-training"
teacher = "{folder}/teacher"
output = "{folder}/melt"
data.files = "{folder}/chats.jsonl"
chunk_size = 16
sequence_length = 64
batch_tokens = 256
micro_batch = 2
dtype = "float32"
checkpoint_chunks = false
[transition]
steps = 4
learning_rate = 1e-3
warmup = 1
interpolate = true
loops = [2, 3]
[alignment]
steps = 4
learning_rate = 1e-3
warmup = 1
loops = [2, 3]
alignment = 0.1
"""

TIMED = ("seconds", "tokens_per_second", "flops_per_second")


def prepare(folder: Path) -> Path:
    """Write teacher, chats and recipe; return the recipe's path."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LoopLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        total_ut_steps=3,
        initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id,
    )
    enliven(OuroForCausalLM(config)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n")
    chats = [
        [{"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.reply}]
        for each in islice(questions("train", "run", 4), 9)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats] + [json.dumps({"text": "Ann is in Rome. " * 3})]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.toml"


def logged(run: Path) -> list[dict]:
    """Read every step's numbers, but those that time decides."""
    entries = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in TIMED} for entry in entries]


def assert_close(one: list[dict], other: list[dict]) -> None:
    """Assert that two runs' logs are the same but for rounding."""
    for entry, expected in zip(one, other, strict=True):
        assert entry.keys() == expected.keys()
        for part, value in expected.items():
            assert entry[part] == (value if part == "stage" else pytest.approx(value, rel=1e-4)), entry


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Return when the file is there, which a running process is about to write."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
