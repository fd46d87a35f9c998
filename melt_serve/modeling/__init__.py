"""LoopLM and MELT in plain PyTorch, as `transformers` models: the truth that all else is tested against.

Importing this package makes `AutoModelForCausalLM.from_pretrained` know both model types.
"""

from transformers import AutoModelForCausalLM

from melt_serve.config import LoopLMConfig, MeltConfig
from melt_serve.modeling.looplm import OuroForCausalLM
from melt_serve.modeling.melt import MeltForCausalLM
from melt_serve.modeling.rows import MeltRows

AutoModelForCausalLM.register(LoopLMConfig, OuroForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(MeltConfig, MeltForCausalLM, exist_ok=True)

__all__ = ["LoopLMConfig", "MeltConfig", "MeltForCausalLM", "MeltRows", "OuroForCausalLM"]
