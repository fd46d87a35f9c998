"""What `python -m melt_serve.train run` writes is what vLLM serves."""

import torch
from transformers import AutoModelForCausalLM

from melt_serve.task.tokenizer import VOCABULARY, build_tokenizer
from melt_serve.train.__main__ import main
from tests.engine.engines import engine, generate, prompts, save_looplm
from tests.train.tiny_run import prepare


def test_a_run_ends_with_a_checkpoint_that_vllm_takes_as_it_is(tmp_path):
    recipe = prepare(tmp_path)
    save_looplm(tmp_path / "teacher", vocab_size=VOCABULARY)
    build_tokenizer().save_pretrained(tmp_path / "teacher")
    words = ("chunk_size=32", "transition.steps=1", "alignment.steps=1", "--run", str(tmp_path / "run"))
    assert main(["run", str(recipe), *words]) == 0
    melt = AutoModelForCausalLM.from_pretrained(tmp_path / "melt").eval()
    with engine(tmp_path / "melt") as llm:
        for prompt in prompts(20, 45):
            (answer,) = generate(llm, [prompt], logprobs=None)
            with torch.no_grad():
                expected = melt.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
            assert list(answer.token_ids) == expected[0, len(prompt) :].tolist()
