"""vLLM's CPU worker, which tells the model each request's loops, and survives seeded requests of several steps."""

from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from melt_serve.engine.depth import depth_of


class MeltCPUModelRunner(CPUModelRunner):
    """Passes loops on, and puts a request's random generator back after a step whose sample is thrown away.

    vLLM 0.32 does so by moving the generator's offset, which CPU generators do not have: a seeded
    request that needs more than one prefill step would end the engine. With a chunk grid every
    prompt longer than C is such a request.
    """

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.model_config.hf_config.model_type == "melt":
            requests = (self.requests[request_id] for request_id in self.input_batch.req_ids)
            kwargs["depths"] = [depth_of(request.sampling_params) for request in requests]
        return super()._model_forward(*args, **kwargs)

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


class MeltCPUWorker(CPUWorker):
    """The CPU worker with the runner above."""

    def init_device(self) -> None:
        """Set the device up as vLLM does, then take our runner, unless vLLM's newer one (V2) was chosen."""
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner = MeltCPUModelRunner(self.vllm_config, torch.device("cpu"))
