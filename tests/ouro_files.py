"""A checkpoint with the structure of Ouro's published files, whose answers are known word for word.

Its layers add nothing to the residual stream, so the next token is a function of the last one alone: the head's rows
are the embeddings of what comes before them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from melt_serve.config import LoopLMConfig, weight_shapes

END_OF_TEXT, START, END, THINK, END_THINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
SPECIAL = (END_OF_TEXT, START, END, THINK, END_THINK)
WORDS = (*"\n", "user", "assistant", "system", "Hm", "so", "well", "Yes", "it", "is", "Why")
VOCABULARY = 64

# What the published files have: one end mark for all (0), turns that end with another (2), no generation_config.json.
BASE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_TEMPLATE = BASE_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking %}{{ '<think>\n' }}{% endif %}",
)
PUBLISHED_OURO = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": ["full_attention"] * 24,
    "max_position_embeddings": 65536,
    "max_window_layers": 24,
    "model_type": "ouro",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 49152,
}
"""Ouro-1.4B's `config.json`, as ByteDance publishes it."""

CONFIG = {
    **PUBLISHED_OURO,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "layer_types": ["full_attention"],
    "max_position_embeddings": 512,
    "max_window_layers": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}
"""The same of the checkpoint written here."""


def write_ouro(folder: Path, says: Mapping[str, Sequence[str]], template: str = BASE_TEMPLATE) -> Path:
    """Write the checkpoint into `folder`, and return it.

    Args:
        says: what comes after each token, the likeliest first; after all others comes the end of the text.
    """
    tokenizer = tokenizer_of(template)
    ids = tokenizer.get_vocab()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    weights = {
        key: torch.ones(shape) if "norm" in key else torch.zeros(shape)
        for key, shape in weight_shapes(LoopLMConfig(**CONFIG))
    }
    weights["model.embed_tokens.weight"] = torch.eye(VOCABULARY)
    head = torch.zeros(VOCABULARY, VOCABULARY)
    head[0] = 1  # the end of the text, where nothing is said
    for before, choices in says.items():
        for rank, after in enumerate(choices):
            head[ids[after], ids[before]] = 8 - rank
    weights["lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words, with Ouro's special tokens in their places."""
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
