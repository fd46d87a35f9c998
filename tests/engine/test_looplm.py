"""LoopLM (Ouro) checkpoints in the same engine: the baseline, under vLLM's own scheduler and prefix cache."""

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams, TokensPrompt

from melt_serve.bundled import LOOPLM
from melt_serve.config import kv_bytes_per_token
from melt_serve.task.evaluate import heldout
from melt_serve.task.tokenizer import prompt_ids
from tests.engine.engines import RIGHT, distance, engine, generate, prompts, save_looplm, scheduler_of
from tests.engine.scenes import counted

LENGTHS = (1, 2, 31, 64, 65, 203)


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_float32_equals_the_reference_at_every_depth_and_the_cache_grows_with_the_loops(tmp_path, loops):
    model, asked = save_looplm(tmp_path), prompts(*LENGTHS)
    with engine(tmp_path, hf_overrides={"total_ut_steps": loops}) as llm:
        assert distance(model, asked, generate(llm, asked), loops) <= RIGHT
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
    row = kv_bytes_per_token(model.config, bytes_per_value=4, loops=loops)
    assert (32 << 20) // row - cache.block_size < tokens <= (32 << 20) // row


def test_small_budgets_a_warm_prefix_cache_and_seeds_keep_answers_as_they_are(tmp_path):
    model, asked = save_looplm(tmp_path, num_key_value_heads=4, tie_word_embeddings=True), prompts(*LENGTHS)
    with engine(tmp_path, max_num_batched_tokens=48, max_num_seqs=8, enable_prefix_caching=True, block_size=32) as llm:
        with counted(scheduler_of(llm)) as counts:
            for _ in range(2):
                assert distance(model, asked, generate(llm, asked)) <= RIGHT
        assert counts["hit"] >= 192
        drawn = []
        for seed in (7, 7, 8):
            assert llm.reset_prefix_cache()  # so that each is prefilled in several steps
            drawn.append(generate(llm, prompts(200), temperature=1.0, seed=seed)[0].token_ids)
    first, again, other = drawn
    assert first == again != other


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
