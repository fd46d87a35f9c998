"""Drafts by depth: tokens that the first k loops of the same model guess, in the rows of their requests' own loops.

A token's rows of loops 1 to k are the same whether or not later loops follow. So what a guess writes is what its
verification writes again: there is no second model and no second cache, and rows of guesses that prove wrong are
overwritten before anybody reads them. n guesses and their verification are n * k + T loops for up to n + 1 tokens,
which take T each without.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from melt_serve.config import LoopLMConfig, MeltConfig, chunk_end
from melt_serve.engine.depth import Asked, Depth, depth_of, takes_drafts

DRAFTER = f"{__name__}.DepthDrafter"
"""The `model` of a `--speculative-config` that drafts by depth."""
LOOPS = "draft_loops"
"""The key of k in `--additional-config`."""


def drafts_by_depth(vllm_config: VllmConfig) -> bool:
    """Return whether the engine drafts with the first loops of its own model."""
    drafts = vllm_config.speculative_config
    return drafts is not None and drafts.method == "custom_class" and drafts.model == DRAFTER


def draft_loops(vllm_config: VllmConfig) -> int:
    """Return k, by default a quarter of the checkpoint's own loops.

    Raises:
        ValueError: it is no number of loops below the most that a request may run.
    """
    config: LoopLMConfig = vllm_config.model_config.hf_config
    options = vllm_config.additional_config
    default = max(1, config.total_ut_steps // 4)
    loops = options.get(LOOPS, default) if isinstance(options, dict) else default
    if isinstance(loops, bool) or loops not in range(1, config.most_loops):
        raise ValueError(
            f"{config.family}: {LOOPS}={loops!r} of --additional-config must be a whole number from 1 to "
            f"{config.most_loops - 1}, below the checkpoint's max_loops"
        )
    return int(loops)


class DepthDrafter:
    """What vLLM calls a proposer. It drafts for requests that run more than k loops.

    Attributes:
        loops: k.
        most: n, in this step.
        runner: the worker's (cpu_worker.py), whose requests it drafts for.
    """

    runner: Any

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = vllm_config
        self.loops = draft_loops(vllm_config)
        self.most = vllm_config.num_speculative_tokens

    def load_model(self, model: Any) -> None:
        """Take the model that is served, once it is loaded."""
        self.model = model

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens: np.ndarray, token_ids: np.ndarray, **_: Any
    ) -> list[list[int]]:
        """Draft up to n tokens for each request of the step, one after another for all of them together.

        Args:
            sampled_token_ids: by request, what the step has given it; nothing while its prompt is not through.
            num_tokens: by request, all its tokens, those included.
            token_ids: [requests, longest], the tokens.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        asked = [self.runner.requests[each].sampling_params for each in self.runner.input_batch.req_ids]
        depths = [depth_of(each) for each in asked]
        drafted = [bool(new) and takes_drafts(each) for new, each in zip(sampled_token_ids, asked, strict=True)]
        room = np.array([drafted[row] * self.room(depth, int(num_tokens[row])) for row, depth in enumerate(depths)])
        rows = np.flatnonzero(room)
        tokens = token_ids[rows, num_tokens[rows] - 1]
        for ahead in range(self.most):
            going = room[rows] > ahead
            rows, tokens = rows[going], tokens[going]
            if not len(rows):
                break
            tokens = self.guess([depths[row] for row in rows], rows, tokens, num_tokens[rows] - 1 + ahead)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                drafts[row].append(token)
        return drafts

    def room(self, depth: Depth, tokens: int) -> int:
        """Return how many drafts are verified together with the last of so many tokens: none behind its chunk."""
        if depth.loops <= self.loops:
            return 0
        config = self.vllm_config.model_config.hf_config
        most = min(self.most, self.runner.max_model_len - tokens)
        return min(most, chunk_end(tokens - 1, config.chunk_size) - tokens) if isinstance(config, MeltConfig) else most

    def guess(self, depths: Sequence[Depth], rows: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return what follows a token of each of some requests, by the first k loops' answer.

        Args:
            depths: of the requests.
            rows: [A], which of the step's requests they are.
            tokens: [A].
            positions: [A], those of the tokens in their requests.
        """
        count, runner = len(rows), self.runner
        starts = torch.arange(count + 1, dtype=torch.int32)
        lengths = torch.from_numpy(positions.astype(np.int32) + 1)
        slots = torch.zeros(count, dtype=torch.int64)  # of final rows, which loops before the last do not write
        tables = [table.get_device_tensor(len(runner.input_batch.req_ids))[rows] for table in self.block_tables]
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=int(lengths.max()),
            block_table_tensor=tables[0],
            slot_mapping=slots,
            causal=True,
        )
        metadata: dict[str, Any] = {}
        for (group,), table in zip(runner.attn_groups, tables, strict=True):
            built = group.build_metadata(replace(common, block_table_tensor=table))
            metadata |= dict.fromkeys(group.layer_names, built)
        from melt_serve.engine.step import StepPlan  # with what only a worker needs

        # No token leaves early: a guess may be wrong, and its rows are written again.
        asked = [Asked(Depth(depth.loops, 1.0)) for depth in depths]
        plan = StepPlan.of(asked, starts.numpy(), lengths.numpy(), at_most=self.loops)
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=count, slot_mapping=dict.fromkeys(metadata, slots)
        ):
            x = self.model(torch.from_numpy(tokens), torch.from_numpy(positions.astype(np.int64)), plan=plan)
        return self.model.compute_logits(x).argmax(-1).numpy()

    @property
    def block_tables(self) -> Sequence[Any]:
        """vLLM's block tables of the step's requests, one of each cache group."""
        return self.runner.input_batch.block_table.block_tables
