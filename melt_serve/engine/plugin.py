"""The entry point vLLM loads in every process: makes `vllm serve` know MELT and LoopLM checkpoints."""

import multiprocessing

from vllm.version import __version__ as vllm_version

from melt_serve import config
from melt_serve.engine import lifeline, versions


def register() -> None:
    """Register configs, models and their start-up checks. Idempotent: vLLM may call it often.

    Raises:
        RuntimeError: this vLLM is none of the versions that melt-serve knows.
    """
    parent = multiprocessing.parent_process()
    versions.check(vllm_version, warn=parent is None)
    if parent is not None:  # an engine, a worker, one of several API servers
        lifeline.hold(multiprocessing.current_process().name)
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager

    from melt_serve.engine import patches
    from melt_serve.engine.contract import LoopLMStartup, MeltStartup

    config.register()
    # Before it is known what model is served: for every process.
    patches.sleep_while_waiting()
    patches.start_beside_numba()
    patches.fit_queues_into_shared_memory()
    for module, architecture, startup in (
        ("melt", "MeltForCausalLM", MeltStartup),
        ("looplm", "OuroForCausalLM", LoopLMStartup),
    ):
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"melt_serve.engine.{module}:{architecture}")
        MODELS_CONFIG_MAP[architecture] = startup
    ReasoningParserManager.register_lazy_module("loops", "melt_serve.engine.reasoning", "LoopedReasoning")
