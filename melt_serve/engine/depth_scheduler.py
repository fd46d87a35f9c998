"""Requests of mixed depths under vLLM's scheduler: what LoopLMs and MELTs have in common there."""

from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from melt_serve.config import MeltConfig
from melt_serve.engine import patches
from melt_serve.engine.depth import RETURN_LOOPS, Depth, depth_of, takes_drafts
from melt_serve.engine.depth_drafts import drafts_by_depth
from melt_serve.engine.scheduler_stats import StepCounts
from melt_serve.engine.usage import ASKED, LOOPS_RUN, TOKEN


class DepthScheduler(AsyncScheduler):
    """vLLM's scheduler, with the depth of every request and the loops that its tokens ran.

    Attributes:
        depths: of all requests that are not finished, by request id.
        loops_run: generated tokens of running requests, by request id and by the loops they ran.
        sampled: by request id, the loops of the tokens that this step gave it, until it is known how many it keeps.
        counts: since the last statistics.
        mode: a MELT's decode mode, by its name; nothing for a LoopLM.
    """

    dynamic_sd_lookup: list[int] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patches.resolve_depths_in_the_engine()
        if drafts_by_depth(self.vllm_config):  # they write rows behind the step's last token
            self.num_lookahead_tokens = self.num_spec_tokens
        if self.num_spec_tokens and self.dynamic_sd_lookup is None:
            # Without a table of drafts by batch size vLLM fills a waiting request's lone token up with placeholders of
            # drafts, for CUDA graphs of whole steps, and leaves it out of a step that has no room for them.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self.depths: dict[str, Depth] = {}
        self.loops_run: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.sampled: dict[str, Sequence[int]] = {}
        self.counts = StepCounts()
        config = self.vllm_config.model_config.hf_config
        self.mode = {"decode_mode": config.decode_mode} if isinstance(config, MeltConfig) else {}

    def add_request(self, request: Request) -> None:
        """Enqueue a request, and remember its depth."""
        self.depths[request.request_id] = depth_of(request.sampling_params)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step as vLLM does, and order its requests by their loops.

        vLLM's GPU runner keeps this order among a step's decodes: those that run another loop are then the first ones,
        and are not gathered.
        """
        output = super().schedule(throttle_prefills)
        scheduled = output.num_scheduled_tokens
        output.num_scheduled_tokens = dict(sorted(scheduled.items(), key=lambda item: -self.depths[item[0]].loops))
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Keep drafts for the next step as vLLM does, but only where a request takes them."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is not None and not takes_drafts(request.sampling_params):
                request.spec_token_ids = []

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Count the loops that the generated tokens ran, and update the requests as vLLM does.

        An output of a request with stop strings may be its last, which only the front end finds: it has the count. One
        of a request that wants to know what each token ran has that.
        """
        token_loops: Mapping[str, Sequence[int]] = getattr(model_runner_output, "token_loops", {})
        told: dict[str, tuple[int, list[float]]] = {}
        for request_id, generated in zip(
            model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=False
        ):
            depth, request = self.depths.get(request_id), self.requests.get(request_id)
            if not generated or depth is None or request is None:
                continue
            if request.drop_stale_output and request.num_stale_output_tokens > 0:  # vLLM throws these tokens away
                continue
            loops: Sequence[int] = [depth.loops] * len(generated)
            if depth.exit_threshold < 1:
                drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
                loops = token_loops[request_id][-1 - drafts :][: len(generated)]
            self.sampled[request_id] = loops
            if request.sampling_params.extra_args.get(RETURN_LOOPS):
                (ran,) = loops
                told[request_id] = ran, model_runner_output.exit_probabilities[request_id][:ran].tolist()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, loops in self.sampled.items():
            self.loops_run[request_id].update(loops)
        self.sampled.clear()
        for output in chain.from_iterable(each.outputs for each in outputs.values()):
            request = self.requests.get(output.request_id)
            if request is not None and not output.finished and request.sampling_params.stop:
                output.kv_transfer_params = self._loops_of(output.request_id)
            if output.new_token_ids and output.request_id in told:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), TOKEN: told[output.request_id]}
        return outputs

    def _loops_of(self, request_id: str) -> dict[str, Any] | None:
        """Return what `usage.py` takes: the loops that a request's tokens ran so far, or None before there are any."""
        run = self.loops_run.get(request_id)
        return {ASKED: {**asdict(self.depths[request_id]), **self.mode}, LOOPS_RUN: dict(run)} if run else None

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Return vLLM's statistics, if it wants any, with our counts since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        counts = self.counts
        self.counts = StepCounts()
        self._count_blocks(counts)
        counts.put(stats)
        return stats

    @abstractmethod
    def _count_blocks(self, counts: StepCounts) -> None:
        """Add what the cache holds now."""

    def _blocks_in_use(self) -> int:
        pool = self.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict | None, dict | None]:
        params, encoder_params = super()._free_request(request, *args, **kwargs)
        # What was sampled behind the answer's last token, in the same step, is not a part of it.
        run = self.loops_run[request.request_id]
        run.update(self.sampled.pop(request.request_id, ())[: request.num_output_tokens - run.total()])
        if loops := self._loops_of(request.request_id):
            params = {**(params or {}), **loops}
        self.loops_run.pop(request.request_id, None)
        self.depths.pop(request.request_id)
        return params, encoder_params


def salt_with_depth(request: Request, depth: Depth) -> None:
    """Make the depth a part of the identity of a request's blocks."""
    request.cache_salt = f"{depth} {request.cache_salt or ''}"
    request.block_hashes.clear()
    request.update_block_hashes()
