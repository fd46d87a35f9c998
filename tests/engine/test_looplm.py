"""LoopLM (Ouro) checkpoints in the same engine: the baseline, under vLLM's own scheduler and prefix cache."""

import pytest
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams, TokensPrompt

from melt_serve.bundled import LOOPLM
from melt_serve.config import kv_bytes_per_token
from melt_serve.modeling import OuroForCausalLM
from melt_serve.task.evaluate import heldout
from melt_serve.task.tokenizer import prompt_ids
from tests.engine.engines import engine, engine_logprobs, generate, prompts, save_looplm

LENGTHS = (1, 2, 31, 64, 65, 203)
FLOAT32 = 1e-4


@torch.no_grad()
def furthest(model: OuroForCausalLM, asked, outputs, loops: int) -> float:
    """The largest difference in log-probability between engine and reference."""
    distances = []
    for prompt, output in zip(asked, outputs, strict=True):
        logits = model(torch.tensor([[*prompt, *output.token_ids]]), loops=loops).logits[0, len(prompt) - 1 : -1]
        distances.append((engine_logprobs(output) - logits.log_softmax(-1)).abs().max().item())
    return max(distances)


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_float32_equals_the_reference_at_every_depth(tmp_path, loops):
    model = save_looplm(tmp_path)
    with engine(tmp_path, hf_overrides={"total_ut_steps": loops}) as llm:
        assert furthest(model, prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), loops) <= FLOAT32


def test_small_budgets_and_a_warm_prefix_cache_change_nothing(tmp_path):
    model = save_looplm(tmp_path, num_key_value_heads=4, tie_word_embeddings=True)
    with engine(tmp_path, max_num_batched_tokens=48, max_num_seqs=8, enable_prefix_caching=True, block_size=32) as llm:
        for _ in range(2):
            assert furthest(model, prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), 4) <= FLOAT32
        hits = [metric for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
        assert sum(metric.value for metric in hits) >= 192


def test_a_seeded_request_of_several_prefill_steps_repeats_itself(tmp_path):
    save_looplm(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=48, max_num_seqs=8, enable_prefix_caching=False) as llm:
        first, again, other = (
            generate(llm, prompts(200), temperature=1.0, seed=seed)[0].token_ids for seed in (7, 7, 8)
        )
    assert first == again != other


def test_tensor_parallel_two_equals_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_looplm(tmp_path)
    with engine(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert furthest(model, prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), 4) <= FLOAT32


def test_compiled_equals_the_reference(tmp_path):
    model = save_looplm(tmp_path, num_hidden_layers=1)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert furthest(model, prompts(*LENGTHS), generate(llm, prompts(*LENGTHS)), 4) <= FLOAT32


@pytest.mark.parametrize("loops", [1, 4])
def test_the_cache_grows_with_the_loops(tmp_path, loops):
    model = save_looplm(tmp_path)
    with engine(tmp_path, hf_overrides={"total_ut_steps": loops}) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
    row = kv_bytes_per_token(model.config, bytes_per_value=4, loops=loops)
    assert (32 << 20) // row - cache.block_size < tokens <= (32 << 20) // row


def test_pipeline_parallelism_is_refused(tmp_path):
    save_looplm(tmp_path)
    with pytest.raises(NotImplementedError, match=r"[Pp]ipeline"), engine(tmp_path, pipeline_parallel_size=2):
        pass


def test_the_bundled_teacher_answers():
    tokenizer, asked = AutoTokenizer.from_pretrained(LOOPLM), heldout(20)
    with engine(LOOPLM, skip_tokenizer_init=False) as llm:
        chats = [TokensPrompt(prompt_token_ids=prompt_ids(question, tokenizer)) for question in asked]
        outputs = llm.generate(chats, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    replies = [output.outputs[0].text.partition("</think>")[2] for output in outputs]
    assert sum(question.check(reply) for question, reply in zip(asked, replies, strict=True)) >= 18
