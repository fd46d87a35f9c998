"""The demo's tokenizer: every word of the task is one token, and any other text is bytes."""

from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from melt_serve.task.who_is_where import NAMES, PLACES, Question, questions

VOCABULARY = 512
"""The model's vocabulary, a multiple of 64 as kernels like it; the tokenizer's is a few tokens smaller."""
MAX_TOKENS = 2048
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# Parsers for reasoning and tool calls look for these in the text, so they are not special tokens.
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer of at most `VOCABULARY` tokens with a chat template, the same at every call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS),
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    return fast


def corpus() -> list[str]:
    """Return the text that the merges are learnt from: the task's names and places, and questions for other words."""
    words = [*NAMES, *PLACES]
    text = [f"{word} {word}" for word in words for _ in range(20)]
    for question in islice(questions("train", seed=0), 200):
        text += [question.prompt, question.reply]
    return text + ["system user assistant tool"] * 20


def prompt_ids(question: Question, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Render the question through the chat template, ready for the assistant to speak, as token ids."""
    messages = [{"role": "user", "content": question.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
