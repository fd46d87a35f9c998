"""What a model tells vLLM's GPU runner (V2) about its requests: here, their depths. Never run on a GPU yet."""

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from melt_serve.engine.depth import Depth, depth_of


class MeltModelState(DefaultModelState):
    """Keeps the depth of every running request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depths: dict[str, Depth] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Add a request that begins, or begins again after a preemption."""
        super().add_request(req_index, new_req_data)
        self.depths[new_req_data.req_id] = depth_of(new_req_data.sampling_params)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that has finished or was preempted."""
        super().remove_request(req_id)
        self.depths.pop(req_id, None)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Return what the model's forward takes besides tokens and positions."""
        depths = [self.depths[request_id] for request_id in input_batch.req_ids]
        return {**super().prepare_inputs(input_batch, req_states), "depths": depths}
