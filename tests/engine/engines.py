"""Real vLLM engines on small real checkpoints, in the test's own process, and the reference to hold them against."""

import gc
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import CompletionOutput

from melt_serve.modeling import LoopLMConfig, MeltConfig, MeltForCausalLM, OuroForCausalLM
from tests.tiny_models import enliven

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


def save_melt(path: Path, **overrides: object) -> MeltForCausalLM:
    """A small MELT with seeded random weights that mix tokens, gates and loops visibly; saved at `path`."""
    torch.manual_seed(0)
    config = MeltConfig(**{**SHAPE, "max_loops": 8, "chunk_size": 32, **overrides})
    model = enliven(MeltForCausalLM(config).eval())
    model.model.early_exit_gate.weight.data.mul_(0.5)  # undecided: exits come at every loop
    model.model.early_exit_gate.bias.data.fill_(-0.6)
    model.save_pretrained(path)
    return model


def save_looplm(path: Path, **overrides: object) -> OuroForCausalLM:
    """A LoopLM of the same kind; saved at `path`."""
    torch.manual_seed(0)
    model = enliven(OuroForCausalLM(LoopLMConfig(**{**SHAPE, **overrides})).eval())
    model.save_pretrained(path)
    return model


@contextmanager
def engine(path: Path, **arguments: object) -> Iterator[LLM]:
    """vLLM itself, as its users start it, with nothing of ours named."""
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


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def everything(max_tokens: int, **sampling: object) -> SamplingParams:
    """Greedy, with the log-probability of every token of the vocabulary, unless `sampling` says otherwise."""
    greedy = {"temperature": 0, "logprobs": VOCABULARY, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=max_tokens, **{**greedy, **sampling})


def generate(llm: LLM, token_ids: Sequence[list[int]], **sampling: object) -> list[CompletionOutput]:
    """Answers of `GENERATED` tokens, sampled as in `everything`."""
    parameters = everything(**{"max_tokens": GENERATED, **sampling})
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in token_ids], parameters, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def engine_logprobs(output: CompletionOutput) -> torch.Tensor:
    """[generated, vocabulary], what the engine said before each generated token."""
    table = torch.full((len(output.token_ids), VOCABULARY), float("nan"))
    for row, candidates in zip(table, output.logprobs, strict=True):
        for token, candidate in candidates.items():
            row[token] = candidate.logprob
    return table


@torch.no_grad()
def reference_logprobs(
    model: MeltForCausalLM, prompt: list[int], generated: Sequence[int], loops: int, **exits: float
) -> torch.Tensor:
    """[generated, vocabulary], what the reference says when it decodes the same tokens in the checkpoint's mode."""
    tokens = torch.tensor([[*prompt, *generated]])
    by_token = getattr(model.config, "decode_mode", None) == "token"
    by_token = {"prompt_lengths": torch.tensor([len(prompt)])} if by_token else {}
    output = model(tokens, loops=loops, **by_token, **exits)
    return output.logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def distance(model: MeltForCausalLM, prompt: list[int], output: CompletionOutput, loops: int, **exits: float) -> float:
    """The largest difference in log-probability between engine and reference, over all tokens and steps."""
    expected = reference_logprobs(model, prompt, output.token_ids, loops, **exits)
    return (engine_logprobs(output) - expected).abs().max().item()
