"""Tiny seeded models whose weights are large enough to mix tokens, loops and gates visibly."""

import torch

from melt_serve.modeling import LoopLMConfig, MeltConfig, MeltForCausalLM, OuroForCausalLM

torch.set_num_threads(1)  # more threads make tiny matmuls slower, and far slower on a busy machine

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
}


def tiny_looplm(**overrides: object) -> OuroForCausalLM:
    """Build a LoopLM with 2 layers, 2 KV heads for 4 heads, 4 loops."""
    torch.manual_seed(0)
    model = OuroForCausalLM(LoopLMConfig(**{**SHAPE, **overrides})).eval()
    return enliven(model)


def tiny_melt(**overrides: object) -> MeltForCausalLM:
    """Build a MELT of the same shape, with chunks of 4 tokens and up to 8 loops."""
    torch.manual_seed(0)
    model = MeltForCausalLM(MeltConfig(**{**SHAPE, "chunk_size": 4, "max_loops": 8, **overrides})).eval()
    return enliven(model)


@torch.no_grad()
def enliven(model: torch.nn.Module) -> torch.nn.Module:
    """Give norms, biases and gates values with which a mistake about them shows."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        elif "gate.bias" in name or "input_proj.bias" in name or "loop_bias" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator))
        elif "kv_gate" in name:
            weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw random token ids."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
