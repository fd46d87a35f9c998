"""The plan of a step: which tokens run in each loop, and where their rows are.

The host knows how many loops each request runs, so it knows the step before it runs: requests are put in order of
their loops, most first, and those that run on are always the first of them. Only tokens that exit early are news, of
which the device tells once a loop. Positions, lengths, slots and tables are read on the device: where steps are
scheduled ahead, the host has not seen them yet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from melt_serve.engine.attention import OpenRows, StepRecord
from melt_serve.engine.depth import Asked
from melt_serve.engine.looplm_cache import LoopRowsSpec
from melt_serve.engine.tables import LoopTables, TablesByLoop

Selection: TypeAlias = slice | Tensor
"""Some of a list: the first of it, which takes no copy, or indices on the device."""


class RecordedRows(Protocol):
    """An attention layer whose backend records steps."""

    layer_name: str
    step: StepRecord


@dataclass(frozen=True)
class Sequences:
    """What runs in a loop, as the attention kernel takes it: a sequence's queries are adjacent tokens of one request.

    One of them may be a gap, which stands for nobody: its token has left, and others on both sides of it run.

    Attributes:
        requests: [Q], the request of each, as an index into the step's R.
        first: [Q], the token of its first query, as an index into the step's S.
        starts: [Q + 1], where each begins among the H queries, and H.
        ends: [Q], how many tokens its request has up to its last query, at most.
        running: [A], the queries of the tokens that run, ascending.
    """

    requests: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    running: np.ndarray

    @property
    def size(self) -> int:
        """A, the number of tokens that run."""
        return len(self.running)

    @property
    def has_gaps(self) -> bool:
        """Whether some query is no token's."""
        return self.size < self.starts[-1]

    @property
    def token_starts(self) -> np.ndarray:
        """Where each begins among the A tokens, and A: [Q + 1]."""
        return np.searchsorted(self.running, self.starts).astype(np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens that run, [A], as indices into the step's S."""
        return self.running + self.of_tokens(self.first - self.starts[:-1])

    @property
    def for_device(self) -> list[np.ndarray]:
        """What the device has to know: `requests`, `starts`, the last of each one's tokens among the A, `running`."""
        return [self.requests, self.starts, self.token_starts[1:] - 1, self.running]

    def of_tokens(self, values: np.ndarray) -> np.ndarray:
        """Repeat each sequence's value, [Q], for each of its tokens, [A]."""
        return np.repeat(values, np.diff(self.token_starts))

    def take_first(self, count: int) -> Sequences:
        """Return the first `count` of them."""
        running = self.running[: self.token_starts[count]]
        return Sequences(
            self.requests[:count], self.first[:count], self.starts[: count + 1], self.ends[:count], running
        )

    def take_tokens(self, index: np.ndarray, bridge: bool) -> Sequences:
        """Return what is left of some of the A tokens.

        Args:
            index: of the tokens, ascending.
            bridge: a request stays one sequence, from its first token that is left to its last; where one between them
                has left is a gap. Otherwise it is cut there, into sequences over the same rows: each ends at its own
                last token, so attention is causal.
        """
        own = self.of_tokens(np.arange(len(self.requests)))[index]
        queries = self.running[index]
        cuts = np.diff(own, prepend=-1) != 0
        if not bridge:
            cuts |= np.diff(queries, prepend=-2) != 1
        begins = np.flatnonzero(cuts)
        counts = np.diff(begins, append=len(index))
        left = own[begins]
        first, last = queries[begins], queries[begins + counts - 1]
        starts = np.append(0, np.cumsum(last + 1 - first)).astype(np.int32)
        return Sequences(
            self.requests[left],
            self.first[left] + first - self.starts[left],
            starts,
            self.ends[left] - (self.starts[left + 1] - 1 - last),
            queries + np.repeat(starts[:-1] - first, counts),
        )


@dataclass(frozen=True)
class StepPlan:
    """What the host knows of a step before it runs.

    Attributes:
        asked: [R], what each request asks, as the step's tokens are packed.
        loops: [R], the most loops of each.
        runs: [R], how many of them it may run in this step: fewer where it only drafts.
        thresholds: [R], its exit threshold.
        sequences: the requests, those that run most loops first.
        moved: they are in another order than the step's tokens.
        ran: [S], the loops that each token runs; where tokens exit early it is right once the step has run.
        exit_probabilities: by request, [loops], of the token that is sampled from, after each loop that it ran; of
            requests that ask for it, and right once the step's output is read.
    """

    asked: Sequence[Asked]
    loops: np.ndarray
    runs: np.ndarray
    thresholds: np.ndarray
    sequences: Sequences
    moved: bool
    ran: np.ndarray
    exit_probabilities: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls, asked: Sequence[Asked], query_starts: np.ndarray, seq_lens: np.ndarray, at_most: int | None = None
    ) -> StepPlan:
        """Plan a step.

        Args:
            asked: by each of the R requests.
            query_starts: [R + 1], where the tokens of each begin among the step's S, and S.
            seq_lens: [R], how many tokens each has at the end of the step, at most.
            at_most: run only the first so many loops.
        """
        loops = np.array([each.depth.loops for each in asked], dtype=np.int32)
        runs = loops if at_most is None else np.minimum(loops, at_most)
        order = np.argsort(-runs, kind="stable").astype(np.int32)
        lengths = np.diff(query_starts)
        starts = np.append(0, np.cumsum(lengths[order])).astype(np.int32)
        return cls(
            asked,
            loops,
            runs,
            np.array([each.depth.exit_threshold for each in asked], dtype=np.float32),
            Sequences(order, query_starts[order], starts, seq_lens[order], np.arange(starts[-1], dtype=np.int32)),
            bool((np.diff(runs) > 0).any()),
            np.repeat(runs, lengths),
        )

    def loops_of_last(self, query_starts: np.ndarray, count: int) -> list[list[int]]:
        """Return the loops that ran for the last `count` tokens of each request, [R], fewer where it has fewer."""
        ends = query_starts[1:]
        begins = np.maximum(query_starts[:-1], ends - count)
        return [self.ran[begin:end].tolist() for begin, end in zip(begins, ends, strict=True)]

    @property
    def deepest(self) -> int:
        """The most loops that a token of the step may run."""
        return int(self.loops.max())

    def waits_for_exits(self, loop: int, sequences: Sequences) -> bool:
        """Return whether a token of these may exit early after this loop."""
        requests = sequences.requests
        return bool(((self.thresholds[requests] < 1) & (self.runs[requests] > loop)).any())

    def running_after(self, loop: int, sequences: Sequences) -> int:
        """Return how many of these sequences, the first ones, may run another loop."""
        return int(np.count_nonzero(self.runs[sequences.requests] > loop))

    def tokens_after(self, loop: int, sequences: Sequences) -> int:
        """Return how many of their tokens, the first ones, may run another loop."""
        return int(sequences.token_starts[self.running_after(loop, sequences)])


@dataclass(frozen=True)
class Tables:
    """Where the rows of a loop's tokens are.

    Attributes:
        blocks: [Q, blocks], the block table of each sequence.
        slots: [A], the slots that the tokens write.
    """

    blocks: Tensor
    slots: Tensor


class StepRows:
    """Where the rows of a step's S tokens are, in each loop."""

    def __init__(self, final: Sequence[RecordedRows], open_rows: OpenRows | None, plan: StepPlan, positions: Tensor):
        """Take what vLLM states about the step.

        Args:
            final: the final rows of all layers, or a LoopLM's rows, of all loops.
            open_rows: those of one layer; None in `token` mode and of a LoopLM.
            plan: of the step.
            positions: [S], the position of each token in its request.
        """
        record = final[0].step
        self.names = [layer.layer_name for layer in final]
        self.builder = record.builder
        self.deepest = plan.deepest
        self.tables = LoopTables(record)
        # Where all run one loop, its table is vLLM's.
        by_loop = open_rows is not None or isinstance(record.builder.kv_cache_spec, LoopRowsSpec)
        tables_differ = by_loop and plan.deepest > 1
        # What the device has to know of the plan, in one copy: the order, if it is another, and everybody's loops.
        arrays = [plan.sequences.tokens, *plan.sequences.for_device] if plan.moved else []
        if tables_differ:
            padding = record.common.num_reqs - len(plan.loops)
            arrays.append(np.pad(plan.loops, (0, padding), constant_values=1))
        self.order = to_device(positions.device, *arrays) if arrays else ()
        if tables_differ:
            *_, loops = self.order
            if open_rows is None:
                self.tables = TablesByLoop(record, loops, plan.deepest, int(plan.sequences.ends.max()), positions)
            else:
                self.tables.lay_over(open_rows.step, loops, plan.deepest, positions)


@dataclass(frozen=True)
class Running:
    """The tokens that run in a loop.

    Attributes:
        rows: where the rows of the whole step are.
        sequences: the tokens, as the host knows them.
        tokens: [A], the same on the device, as indices into the step's S.
        requests: [Q], the request of each sequence, as an index into the step's R.
        positions: [A], the position of each token in its request.
        queries: [A], the query of each among the H; None where there are no others.
        metadata: the kernel's, of the H queries, with the tables of final rows; a LoopLM's are those of its first loop.
    """

    rows: StepRows
    sequences: Sequences
    tokens: Selection
    requests: Selection
    positions: Tensor
    queries: Tensor | None
    metadata: Any

    @classmethod
    def all_of(cls, plan: StepPlan, rows: StepRows, positions: Tensor) -> tuple[Running, Selection]:
        """Begin a step: return all its tokens in the plan's order, and which token comes where, [S]."""
        sequences, metadata = plan.sequences, get_forward_context().attn_metadata[rows.names[0]]
        everything = slice(sequences.size)
        requests = slice(len(sequences.requests))
        running = cls(rows, sequences, everything, requests, positions[everything], None, metadata)
        return running._gather(sequences, *rows.order[:5]) if plan.moved else (running, everything)

    def tables(self, loop: int) -> Tables:
        """Return where the rows of these tokens are in this loop."""
        tables = self.rows.tables
        if loop > tables.own_loops:
            return Tables(self.metadata.block_table, self.metadata.slot_mapping)
        return Tables(tables.blocks(loop)[self.requests], tables.slots(loop)[self.tokens])

    @contextmanager
    def select_loop(self, loop: int, copies: Tensor | None = None) -> Iterator[None]:
        """Give attention layers that are called inside this loop's tables, for the tokens that run.

        Args:
            copies: [copies, A], slots that a LoopLM's layers write the same rows to.
        """
        context, names, tables = get_forward_context(), self.rows.names, self.tables(loop)
        metadata = self.metadata
        if tables.blocks is not metadata.block_table:
            metadata = copy.copy(metadata)
            metadata.block_table, metadata.slot_mapping = tables.blocks, tables.slots
        elif metadata is context.attn_metadata[names[0]]:
            yield  # as vLLM has set it up
            return
        slots = metadata.slot_mapping if copies is None else torch.vstack([metadata.slot_mapping, copies])
        changed = replace(
            context,
            attn_metadata={**context.attn_metadata, **dict.fromkeys(names, metadata)},
            slot_mapping={**context.slot_mapping, **dict.fromkeys(names, slots)},
        )
        with override_forward_context(changed):
            yield

    def after(self, loop: int, plan: StepPlan, exited: np.ndarray) -> tuple[Running | None, Selection]:
        """Return what runs the next loop, None if nothing does, and which of the A tokens that is.

        Where all leave together, or nobody exits early, those that stay are the first ones, and nothing is copied.

        Args:
            exited: [those that may run another loop], true for those that exit early, which the plan records.
        """
        count = plan.running_after(loop, self.sequences)
        if not exited.any():
            if count == len(self.sequences.requests):
                return self, slice(len(exited))
            return self._take_first(count) if count else (None, slice(0))
        plan.ran[self.sequences.tokens[: len(exited)][exited]] = loop
        index = np.flatnonzero(~exited)
        if not len(index):
            return None, slice(0)
        left = self.sequences.take_tokens(index, self.rows.builder.bridges_gaps)
        return self._gather(left, *to_device(self.positions.device, index, *left.for_device))

    def _take_first(self, count: int) -> tuple[Running, Selection]:
        """Return the tokens of the first `count` sequences."""
        sequences = self.sequences.take_first(count)
        first = slice(sequences.size)
        return self._rebuild(
            sequences,
            first if isinstance(self.tokens, slice) else self.tokens[first],
            slice(count) if isinstance(self.requests, slice) else self.requests[:count],
            self.positions[first],
            None if self.queries is None else self.queries[first],
            query_start_loc=self.metadata.query_start_loc[: count + 1],
            seq_lens=self.metadata.seq_lens[:count],
            block_table_tensor=self.metadata.block_table[:count],
            slot_mapping=self.metadata.slot_mapping[first],
        ), first

    def _gather(
        self, sequences: Sequences, gathered: Tensor, requests: Tensor, starts: Tensor, last: Tensor, queries: Tensor
    ) -> tuple[Running, Selection]:
        """Return `sequences`, whose tokens are those of the A at `gathered`, and these indices; all on the device."""
        tokens, positions = compose(self.tokens, gathered), self.positions[gathered]
        return self._rebuild(
            sequences,
            tokens,
            requests,
            positions,
            queries,
            query_start_loc=starts,
            seq_lens=(positions[last] + 1).to(starts.dtype),
            block_table_tensor=self.rows.tables.final_blocks[requests],
            slot_mapping=self.rows.tables.final_slots[tokens],
        ), gathered

    def slots_after(self, loop: int, leaving: Selection) -> Tensor:
        """Return the slots in later loops' tables of tokens that leave, or may leave, after this loop.

        Args:
            leaving: [L], these tokens, as indices into the A.

        Returns:
            [loops left, L]; `PAD_SLOT_ID`, where nothing is written, for the slot that the token has written already.
        """
        tokens = compose(self.tokens, leaving)
        written = self.rows.tables.slots(loop)[tokens]
        later = [self.rows.tables.slots(other)[tokens] for other in range(loop + 1, self.rows.deepest + 1)]
        return torch.stack([torch.where(slots == written, PAD_SLOT_ID, slots) for slots in later])

    def _rebuild(
        self,
        sequences: Sequences,
        tokens: Selection,
        requests: Selection,
        positions: Tensor,
        queries: Tensor | None,
        **tensors: Tensor,
    ) -> Running:
        common = CommonAttentionMetadata(
            query_start_loc_cpu=torch.from_numpy(sequences.starts),
            seq_lens_cpu_upper_bound=torch.from_numpy(sequences.ends),
            num_reqs=len(sequences.requests),
            num_actual_tokens=int(sequences.starts[-1]),
            max_query_len=int(np.diff(sequences.starts).max()),
            max_seq_len=int(sequences.ends.max()),
            causal=True,
            **tensors,
        )
        queries = queries if sequences.has_gaps else None
        return Running(
            self.rows, sequences, tokens, requests, positions, queries, self.rows.builder.rebuild(common, queries)
        )


def compose(outer: Selection, inner: Selection) -> Selection:
    """Return which of a list are the `inner` ones of its `outer` ones."""
    return inner if isinstance(outer, slice) else outer[inner]


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Copy whole numbers to the device, all in one copy that nobody waits for; return them as int32."""
    packed = async_tensor_h2d(np.concatenate(arrays).astype(np.int32, copy=False), device=device)
    return packed.split([len(array) for array in arrays])


def begin_to_host(values: Tensor) -> np.ndarray:
    """Return memory that values of the device come to, with what the device does until now; nobody waits for it."""
    if values.device.type == "cpu":
        return values.numpy()
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_pin_memory_available())
    return copied.copy_(values, non_blocking=True).numpy()


def to_host(values: Tensor) -> np.ndarray:
    """Return values of the device, which the host waits for."""
    copied = begin_to_host(values)
    if values.device.type == "cpu":
        return copied
    arrived = torch.Event(values.device)
    arrived.record()
    arrived.synchronize()
    return copied
