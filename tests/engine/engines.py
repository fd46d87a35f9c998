"""Real vLLM engines on small real checkpoints, in the test's own process, and the reference to hold them against.

A process has one engine at a time, since closing one ends vLLM's process groups. Tests that need nothing of their own
share a live one (`served` in conftest.py), which makes room when another engine starts.
"""

import gc
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import utils as linear_layers
from vllm.outputs import CompletionOutput

from melt_serve.modeling import LoopLMConfig, MeltConfig, MeltForCausalLM, OuroForCausalLM
from tests.tiny_models import enliven

ModelT = TypeVar("ModelT", MeltForCausalLM, OuroForCausalLM)
VOCABULARY = 128
GENERATED = 8
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.12,
    "total_ut_steps": 4,
}

RIGHT, WRONG = 1e-4, 1e-2
"""Distances in log-probability: what rounding in float32 stays below, and what a mistake is above."""
AROUND_CUTS = (1, 2, 31, 32, 33, 63, 64, 65, 100, 203)
"""Lengths of prompts that end on the cuts of chunks of 32 tokens, beside them and far from them."""
LENGTHS = (1, 31, 32, 33, 64, 65, 100, 203)
DEPTHS = (1, 4, 8, 2, 4, 1, 3, 8)
EXITS = (1.0, 0.5, 0.85, 1.0, 0.7, 0.3, 0.6, 0.9)
CONTRASTS = ((0, 1), (1.5, 2), (3, 1), (0.5, 1), (0, 1), (0, 1), (2, 2), (1, 7))
"""A batch that mixes depths: prompts of `LENGTHS` tokens, each with its loops, exit threshold and contrast (w, k)."""

ADAPTERS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
KINDS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "token": ({}, {}),
    "chunk": ({"decode_mode": "chunk"}, {}),
    "token, chunks of 64": ({"chunk_size": 64}, {}),
    "chunk, chunks of 64": ({"decode_mode": "chunk", "chunk_size": 64}, {}),
    "token, chunks of 96": ({"chunk_size": 96}, {}),
    "chunk, chunks of 96": ({"decode_mode": "chunk", "chunk_size": 96}, {}),
    "token, adapters": ({}, ADAPTERS),
    "chunk, adapters": ({"decode_mode": "chunk"}, ADAPTERS),
}
"""What tests share, by name: the checkpoint's overrides, and the engine's options beside blocks of 32 tokens."""

shared = ExitStack()
"""Closes the engine that tests share."""


class Served(NamedTuple):
    """A live engine, and the reference model of its checkpoint."""

    llm: LLM
    model: MeltForCausalLM


def on(*kinds: str, fixture: str = "served") -> pytest.MarkDecorator:
    """Run a test on an engine of each kind, which the fixture gives: the shared one of `KINDS`, or a file's own."""
    return pytest.mark.parametrize(
        fixture, kinds, indirect=True, ids=lambda kind: kind.replace(", ", "-").replace(" ", "-")
    )


def save_melt(path: Path, **overrides: object) -> MeltForCausalLM:
    """Save a small MELT at `path`, with seeded random weights that mix tokens, gates and loops visibly."""
    torch.manual_seed(0)
    config = MeltConfig(**{**SHAPE, "max_loops": 8, "chunk_size": 32, **overrides})
    return undecided(MeltForCausalLM(config), path)


def save_looplm(path: Path, **overrides: object) -> OuroForCausalLM:
    """Save a LoopLM of the same kind at `path`."""
    torch.manual_seed(0)
    return undecided(OuroForCausalLM(LoopLMConfig(**{**SHAPE, **overrides})), path)


def undecided(model: ModelT, path: Path) -> ModelT:
    """Make a model's weights lively, let its exits come at every loop, and save it."""
    enliven(model.eval())
    model.model.early_exit_gate.weight.data.mul_(0.5)
    model.model.early_exit_gate.bias.data.fill_(-0.6)
    model.save_pretrained(path)
    return model


@contextmanager
def engine(path: Path, **arguments: object) -> Iterator[LLM]:
    """Start vLLM itself, as its users do, with nothing of ours named; the shared engine makes room for it."""
    shared.close()
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 32 << 20,
        "max_model_len": 512,
        "max_logprobs": -1,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    llm = LLM(str(path), **{**defaults, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def keep_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights of linear layers as they are loaded, like on a GPU; a CPU packs them."""

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(linear_layers, "dispatch_cpu_unquantized_gemm", plain)


def scheduler_of(llm: LLM) -> Any:
    """Return a live engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Draw one random prompt of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def everything(max_tokens: int, **sampling: object) -> SamplingParams:
    """Ask greedily, with the log-probability of every token of the vocabulary, unless `sampling` says otherwise."""
    greedy = {"temperature": 0, "logprobs": VOCABULARY, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=max_tokens, **{**greedy, **sampling})


def generate(
    llm: LLM,
    asked: Sequence[list[int]],
    loops: int | Sequence[int] | None = None,
    exits: float | Sequence[float] | None = None,
    contrasts: Sequence[tuple[float, int]] | None = None,
    adapters: Sequence[LoRARequest | None] | None = None,
    told: bool = False,
    **sampling: object,
) -> list[CompletionOutput]:
    """Answer all prompts in one batch, with `GENERATED` tokens each, sampled as in `everything`.

    Args:
        asked: the prompts' token ids.
        loops: of all requests or of each; the checkpoint's own if None.
        exits: exit thresholds, likewise.
        contrasts: w and k of each, or none; with a w of 0 the request says nothing of it.
        adapters: one for each prompt, or None where there is none.
        told: ask what each token ran, too.
    """
    depths: list[dict[str, object]] = [{"return_loops": True} if told else {} for _ in asked]
    for name, values in (("loops", loops), ("exit_threshold", exits)):
        if values is not None:
            each = values if isinstance(values, Sequence) else [values] * len(asked)
            for depth, value in zip(depths, each, strict=True):
                depth[name] = value
    for depth, (weight, loop) in zip(depths, contrasts or (), strict=contrasts is not None):
        if weight:
            depth |= {"contrast": weight, "contrast_loop": loop}
    parameters = [everything(**{"max_tokens": GENERATED, "extra_args": depth, **sampling}) for depth in depths]
    tokens = [TokensPrompt(prompt_token_ids=ids) for ids in asked]
    outputs = llm.generate(tokens, parameters, use_tqdm=False, lora_request=adapters and list(adapters))
    return [output.outputs[0] for output in outputs]


def engine_logprobs(output: CompletionOutput) -> torch.Tensor:
    """Return what the engine said before each generated token: [generated, vocabulary]."""
    table = torch.full((len(output.token_ids), VOCABULARY), float("nan"))
    for said, candidates in zip(table, output.logprobs, strict=True):
        for token, candidate in candidates.items():
            said[token] = candidate.logprob
    return table


def reference_logprobs(
    model: MeltForCausalLM | OuroForCausalLM,
    asked: Sequence[list[int]],
    answers: Sequence[Sequence[int]],
    loops: int | Sequence[int] | None = None,
    exits: float | Sequence[float] | None = None,
    contrasts: Sequence[tuple[float, int]] | None = None,
) -> list[torch.Tensor]:
    """Return what the reference says when it decodes the same tokens: [generated, vocabulary] for each prompt."""
    return [logits.log_softmax(-1) for logits in reference_logits(model, asked, answers, loops, exits, contrasts)]


@torch.no_grad()
def reference_logits(
    model: MeltForCausalLM | OuroForCausalLM,
    asked: Sequence[list[int]],
    answers: Sequence[Sequence[int]],
    loops: int | Sequence[int] | None = None,
    exits: float | Sequence[float] | None = None,
    contrasts: Sequence[tuple[float, int]] | None = None,
) -> list[torch.Tensor]:
    """Return the reference's logits when it decodes the same tokens in the checkpoint's mode.

    One call for all of them, with padding on the right.

    Returns:
        [generated, vocabulary] for each prompt.
    """
    whole = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(asked, answers, strict=True)]
    output = model(
        pad_sequence(whole, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(tokens) for tokens in whole], batch_first=True),
        prompt_lengths=torch.tensor([len(prompt) for prompt in asked]),
        loops=torch.tensor(loops) if isinstance(loops, Sequence) else loops,
        exit_threshold=torch.tensor(exits) if isinstance(exits, Sequence) else exits,
        contrast=torch.tensor([weight for weight, _ in contrasts]) if contrasts else None,
        contrast_loop=torch.tensor([loop for _, loop in contrasts]) if contrasts else None,
    )
    return [
        each[len(prompt) - 1 : len(tokens) - 1]
        for each, prompt, tokens in zip(output.logits.float(), asked, whole, strict=True)
    ]


def distance(
    model: MeltForCausalLM | OuroForCausalLM,
    asked: Sequence[list[int]],
    outputs: Sequence[CompletionOutput],
    loops: int | Sequence[int] | None = None,
    exits: float | Sequence[float] | None = None,
    contrasts: Sequence[tuple[float, int]] | None = None,
) -> float:
    """Return the largest difference in log-probability between engine and reference, over all answers and tokens."""
    expected = reference_logprobs(model, asked, [output.token_ids for output in outputs], loops, exits, contrasts)
    return (torch.cat([engine_logprobs(output) for output in outputs]) - torch.cat(expected)).abs().max().item()


def distance_at_mixed_depths(llm: LLM, model: MeltForCausalLM | OuroForCausalLM) -> float:
    """Ask a batch of requests with loops of their own, then one with exits, too; return the largest difference."""
    asked = prompts(*LENGTHS)
    by_loops = generate(llm, asked, DEPTHS, max_tokens=40)
    by_exits = generate(llm, asked, DEPTHS, EXITS, max_tokens=40)
    return max(distance(model, asked, by_loops, DEPTHS), distance(model, asked, by_exits, DEPTHS, EXITS))
