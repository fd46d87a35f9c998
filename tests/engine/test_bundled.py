"""The bundled MELT through the engine: the reference model's answers, word for word, and as many right ones in FP8."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from melt_serve.bundled import MELT
from melt_serve.task.evaluate import answers, heldout, longest_reply
from melt_serve.task.tokenizer import prompt_ids
from tests.engine.engines import engine
from tests.requires import needs_fp8_rows

TOKENIZER = AutoTokenizer.from_pretrained(MELT)


def served(asked, **options):
    """Return the engine's greedy replies, without their reasoning."""
    greedy = SamplingParams(temperature=0, max_tokens=longest_reply(TOKENIZER))
    with engine(MELT, skip_tokenizer_init=False, **options) as llm:
        prompts = [{"prompt_token_ids": prompt_ids(question, TOKENIZER)} for question in asked]
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
    return [output.outputs[0].text.partition("</think>")[2] for output in outputs]


def right(asked, replies):
    return sum(question.check(reply) for question, reply in zip(asked, replies, strict=True))


@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_engine_and_reference_answer_alike(mode):
    asked, model = heldout(60), AutoModelForCausalLM.from_pretrained(MELT).eval()
    model.config.decode_mode = mode
    replies = served(asked, hf_overrides={"decode_mode": mode})
    depth = {"loops": model.config.total_ut_steps, "exit_threshold": 1.0}
    assert replies == [reply.answer for reply in answers(model, TOKENIZER, asked, **depth)]
    assert right(asked, replies) >= 54


@needs_fp8_rows
@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_fp8_rows_cost_no_more_than_one_point_of_a_hundred(mode):
    asked, options = heldout(200), {"dtype": "bfloat16", "hf_overrides": {"decode_mode": mode}}
    assert right(asked, served(asked, **options, kv_cache_dtype="fp8")) >= right(asked, served(asked, **options)) - 2
