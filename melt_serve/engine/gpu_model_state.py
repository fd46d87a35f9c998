"""What a model tells vLLM's GPU runner (V2) about a step: here, its plan.

Never run on a GPU yet; `tests/engine/test_gpu_runner.py` runs it on a CPU, its start-up included.
"""

from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from melt_serve.config import LoopLMConfig
from melt_serve.engine import patches
from melt_serve.engine.depth import Asked, asked_of, default_depth, resolve_depth
from melt_serve.engine.graphs import LoopGraphs
from melt_serve.engine.step import StepPlan


class MeltModelState(DefaultModelState):
    """Keeps what every running request asks, and the step that ran last.

    Attributes:
        plan: of that step.
        last_step: the ids of its requests, and where the tokens of each begin, and their number.
    """

    plan: StepPlan

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config: LoopLMConfig = self.model_config.hf_config
        self.asked: dict[str, Asked] = {}
        model = self.model.model
        self.graphs = LoopGraphs(model.run_captured, model.graph_kinds, self.vllm_config, self.device)
        self.sampled = 1 + self.vllm_config.num_speculative_tokens
        self.last_step: tuple[list[str], np.ndarray] = [], np.zeros(1, dtype=np.int32)
        patches.capture_no_whole_step(type(self))
        patches.forget_measured_graphs(type(self))
        patches.report_loops_run(type(self))

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Add a request that begins, or begins again after a preemption."""
        super().add_request(req_index, new_req_data)
        # vLLM warms up with requests that no scheduler of ours has seen.
        params = new_req_data.sampling_params or SamplingParams()
        self.asked[new_req_data.req_id] = asked_of(resolve_depth(params, self.config))

    def remove_request(self, req_id: str) -> None:
        """Forget a request that has finished or was preempted."""
        super().remove_request(req_id)
        self.asked.pop(req_id, None)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Return what the model's forward takes besides tokens and positions."""
        unknown = Asked(default_depth(self.config))  # dummy batches: vLLM measures memory, captures graphs, or idles
        asked = [self.asked.get(request_id, unknown) for request_id in input_batch.req_ids]
        plan = StepPlan.of(asked, input_batch.query_start_loc_np, input_batch.seq_lens_cpu_upper_bound.numpy())
        self.plan = plan
        self.last_step = input_batch.req_ids, input_batch.query_start_loc_np[: len(asked) + 1]
        return {**super().prepare_inputs(input_batch, req_states), "plan": plan, "graphs": self.graphs}

    def token_loops(self) -> dict[str, list[int]]:
        """Return the loops that ran for each request's last tokens, as many as it may sample, by request id.

        Those of the step that ran last.
        """
        request_ids, query_starts = self.last_step
        return dict(zip(request_ids, self.plan.loops_of_last(query_starts, self.sampled), strict=True))

    def exit_probabilities(self) -> dict[str, np.ndarray]:
        """Return those of the last of them, by request id, where requests ask for them; they may still be under way."""
        request_ids, _ = self.last_step
        return {request_ids[request]: said for request, said in self.plan.exit_probabilities.items()}

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Drop graphs of another KV cache, whose addresses they hold."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.graphs.clear()

    def capture_inner_cudagraphs(
        self,
        input_buffers: InputBuffers,
        block_tables: BlockTables,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Capture the graphs that the model's forward replays."""
        (final,) = attn_groups[0]
        self.graphs.capture(final, block_tables.input_block_tables[0].shape[1])
