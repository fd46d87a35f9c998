"""The bundled MELT through the engine gives the reference model's answers, word for word."""

from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from melt_serve.bundled import MELT
from melt_serve.train.data import prompt_ids
from melt_serve.train.evaluate import answers, heldout, longest_reply
from tests.engine.engines import engine


def test_engine_and_reference_answer_alike():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MELT).eval(), AutoTokenizer.from_pretrained(MELT)
    asked = heldout(60)
    greedy = SamplingParams(temperature=0, max_tokens=longest_reply(tokenizer))
    with engine(MELT, skip_tokenizer_init=False) as llm:
        prompts = [{"prompt_token_ids": prompt_ids(question, tokenizer)} for question in asked]
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
    served = [output.outputs[0].text.partition("</think>")[2] for output in outputs]
    assert served == answers(model, tokenizer, asked, model.config.total_ut_steps)
    assert sum(question.check(reply) for question, reply in zip(asked, served, strict=True)) >= 54
