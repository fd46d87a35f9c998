"""vLLM's CPU worker, which tells the model the step's plan, survives seeded requests of several steps, takes memory for
rows when they are written, and runs vLLM's own norm kernels."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from melt_serve.config import LoopLMConfig
from melt_serve.engine import patches
from melt_serve.engine.cpu_norms import prefer_kernels
from melt_serve.engine.depth import asked_of
from melt_serve.engine.depth_drafts import drafts_by_depth
from melt_serve.engine.step import StepPlan


class MeltCPUModelRunner(CPUModelRunner):
    """Passes the plan of a step on, and restores a request's random generator after a step whose sample is thrown away.

    vLLM 0.32 restores it by moving the generator's offset, which CPU generators do not have: a seeded
    request that needs more than one prefill step would end the engine. With a chunk grid every
    prompt longer than C is such a request.

    Attributes:
        token_loops: by request id, the loops that ran for its last tokens of the last step: as many as it may sample.
        exit_probabilities: by request id, [loops], those of the last one, where the request asks for them.
    """

    token_loops: Mapping[str, Sequence[int]] = {}
    exit_probabilities: Mapping[str, np.ndarray] = {}

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        if drafts_by_depth(vllm_config):
            self.drafter.runner = self

    def propose_draft_token_ids(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Draft as vLLM does; what drafts by depth is told how many tokens, too, as vLLM tells n-grams."""
        if drafts_by_depth(self.vllm_config):
            self.drafter.most = scheduler_output.num_spec_tokens_to_schedule
        return super().propose_draft_token_ids(scheduler_output, *args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model_config.hf_config, LoopLMConfig):
            return super()._model_forward(*args, **kwargs)
        request_ids = self.input_batch.req_ids
        asked = [asked_of(self.requests[request_id].sampling_params) for request_id in request_ids]
        query_starts = self.query_start_loc.np[: len(asked) + 1]
        plan = StepPlan.of(asked, query_starts, self.optimistic_seq_lens_cpu.numpy()[: len(asked)])
        output = super()._model_forward(*args, plan=plan, **kwargs)
        last = plan.loops_of_last(query_starts, 1 + self.num_spec_tokens)
        self.token_loops = dict(zip(request_ids, last, strict=True))
        self.exit_probabilities = {request_ids[request]: said for request, said in plan.exit_probabilities.items()}
        return output

    def initialize_kv_cache_tensors(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Allocate the cache as vLLM does, from pages that are taken when rows are first written to them."""
        with ZerosOnDemand():
            return super().initialize_kv_cache_tensors(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as vLLM does; the output also states what ran for each request's sampled tokens."""
        output = super().sample_tokens(*args, **kwargs)
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            output.token_loops = self.token_loops  # type: ignore[attr-defined]
            output.exit_probabilities = self.exit_probabilities  # type: ignore[attr-defined]
        return output

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in self._discarded_generators().values()]
        output = super()._sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        discarded = self._discarded_generators()
        for row in discarded:
            del self.input_batch.generators[row]
        output = super()._bookkeeping_sync(*args, **kwargs)
        self.input_batch.generators.update(discarded)
        return output

    def _discarded_generators(self) -> dict[int, torch.Generator]:
        discarded = self.discard_request_mask.np
        return {row: generator for row, generator in self.input_batch.generators.items() if discarded[row]}


class ZerosOnDemand(TorchFunctionMode):
    """Lets `torch.zeros` make vectors of bytes that the system fills with zeros page by page, as they are touched.

    PyTorch writes the zeros: a cache of some GB then takes its memory at the start, and half a minute with it.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function is torch.zeros and options == {"dtype": torch.int8, "device": torch.device("cpu")}:
            pages = mmap.mmap(-1, args[0], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(pages, dtype=torch.int8)
        return function(*args, **options)


class MeltCPUWorker(CPUWorker):
    """vLLM's CPU worker with our runner, and vLLM's own norm kernels."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        prefer_kernels(vllm_config)
        patches.rank_without_a_compiler()
        patches.sample_drafts_at_their_temperatures()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """Set the device up as vLLM does, then take our runner, unless vLLM's newer one (V2) was chosen."""
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner = MeltCPUModelRunner(self.vllm_config, torch.device("cpu"))
