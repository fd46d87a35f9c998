"""The reference model, in plain PyTorch and without a server: batches, depths, and what a row in the cache costs.

python examples/reference_model.py [CHECKPOINT]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import melt_serve.modeling  # noqa: F401  (registers the classes)
from melt_serve.bundled import MELT

path = sys.argv[1] if len(sys.argv) > 1 else MELT
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)

stories = [
    "Answer at once. Ann is in Rome. Bob is with Ann. Kim is with Bob. Where is Kim?",
    "Find everybody. Ann is in Rome. Bob is with Ann. Kim is with Bob. Leo is in Oslo. Where is Kim?",
]
prompts = tokenizer.apply_chat_template(
    [[{"role": "user", "content": story}] for story in stories],
    add_generation_prompt=True,
    padding=True,
    return_tensors="pt",
    return_dict=True,
)
for loops in (2, 4):
    with torch.inference_mode():
        replies = model.generate(**prompts, loops=loops, max_new_tokens=24, do_sample=False)
    print(f"{loops} loops")
    for reply in tokenizer.batch_decode(replies[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True):
        print(f"    {reply}")

config = model.config
row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
print(f"a token's rows in the cache: {row} values at any depth; a LoopLM's: {row} times its loops")
