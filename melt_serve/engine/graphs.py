"""CUDA graphs of one loop, for steps of decodes: without them the host takes longer to launch a loop than it runs.

A graph replays on the memory it was captured on. So what a loop reads and writes lies in buffers that stay: x, h,
positions, slots, block tables and lengths. Since those who run on come first, tokens that have left are behind the
others, and nothing moves between loops. A graph of a MELT is one of loop 1 or of any later loop, for a number of
tokens; of a LoopLM it is one of any loop. They serve every depth. (vLLM's own graphs of a whole step do not: they
replay the default depth, whatever a request asks.)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import current_stream
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.utils import AttentionGroup

from melt_serve.engine.step import Running

BUFFERS = ("x", "h", "loop", "positions", "slots", "blocks", "seq_lens", "counting", "query_starts")
RunLoop = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Runs all layers once: of the graph's kind, loop, positions, x and h (None at loop 1) makes x and h."""


class LoopGraphs:
    """The captured graphs, and the buffers that they replay on.

    Attributes:
        sizes: numbers of tokens that graphs are captured for, ascending.
        kinds: how many different loops there are: loop t is captured as kind t, those beyond the last kind as that.
        graphs: by kind, counted from 1, and by number of tokens.
    """

    def __init__(self, run_loop: RunLoop, kinds: int, vllm_config: VllmConfig, device: torch.device):
        """Begin without graphs: all is run eagerly until `capture`."""
        self.run_loop = run_loop
        self.kinds = kinds
        self.vllm_config = vllm_config
        self.device = device
        most = vllm_config.scheduler_config.max_num_seqs
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes or ()
        self.sizes = sorted(size for size in sizes if size <= most)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def fit(self, running: Running) -> bool:
        """Return whether there are graphs for these tokens: decodes, one of each request, not too many."""
        tokens = running.sequences.size
        return bool(self.graphs) and tokens == len(running.sequences.requests) and tokens <= self.sizes[-1]

    def replay(self, loop: int, running: Running, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run a loop of tokens that `fit`; return x, [A, hidden], and h, [N, A, ...], in buffers of the next loop."""
        tokens = running.sequences.size
        size = next(size for size in self.sizes if size >= tokens)
        put(x, self.x[:tokens])
        if h is not None:
            put(h, self.h[:, :tokens])
        self.loop.fill_(loop)
        tables = running.tables(loop)
        self.positions[:tokens] = running.positions
        self.blocks[:tokens, : tables.blocks.shape[1]] = tables.blocks
        self.slots[:tokens] = tables.slots[:tokens]
        self.seq_lens[:tokens] = running.metadata.seq_lens
        # Tokens behind them belong to no sequence and write no row: some have left the step, and have theirs.
        self.slots[tokens:size] = PAD_SLOT_ID
        self.seq_lens[tokens:size] = 0
        torch.clamp(self.counting[: size + 1], max=tokens, out=self.query_starts[: size + 1])
        # Some backends prepare on the device what depends on lengths, in buffers of their own.
        self.builder.rebuild(self._batch(size, tokens, int(running.sequences.ends.max())))
        self.graphs[min(loop, self.kinds), size].replay()
        return self.x[:tokens], self.h[:, :tokens]

    def clear(self) -> None:
        """Drop all graphs and buffers: they hold memory, and addresses of a KV cache that is about to go."""
        self.graphs.clear()
        for name in BUFFERS:
            self.__dict__.pop(name, None)

    @torch.inference_mode()
    def capture(self, final: AttentionGroup, blocks: int) -> None:
        """Capture a graph of each kind for each size, the largest first, as vLLM does.

        Args:
            final: vLLM's group of all layers' final rows.
            blocks: the length of a row of its block table.
        """
        self.clear()
        if not self.sizes:
            return
        most, config = self.sizes[-1], self.vllm_config.model_config
        self.names, self.builder = final.layer_names, final.get_metadata_builder()

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.x = buffer(most, config.get_hidden_size(), dtype=config.dtype)
        self.loop = buffer(dtype=torch.int64).fill_(2)  # a loop that there is: a gate may look up its bias
        self.positions = buffer(most, dtype=torch.int64)
        self.slots = buffer(most, dtype=torch.int64).fill_(PAD_SLOT_ID)  # captures write no rows
        self.blocks = buffer(most, blocks)
        self.seq_lens = buffer(most)
        self.counting = torch.arange(most + 1, dtype=torch.int32, device=self.device)
        self.query_starts = self.counting.clone()
        self.h = self.x.new_empty(0)
        self.h = self._loop(1, most)().clone()  # as wide as this model's loops hand it on
        with graph_capture(device=self.device):
            for size in reversed(self.sizes):
                for kind in range(1, self.kinds + 1):
                    self._loop(kind, size)()  # kernels are compiled and workspaces made outside of a graph
                    self.graphs[kind, size] = record(self._loop(kind, size), self.vllm_config)

    def _loop(self, kind: int, size: int) -> Callable[[], Tensor]:
        """Prepare a loop of `size` tokens on the buffers; what is returned launches it, and returns its h."""
        self.seq_lens.fill_(1)
        batch = self._batch(size, size, self.vllm_config.model_config.max_model_len)
        metadata = self.builder.build_for_cudagraph_capture(batch)

        def run() -> Tensor:
            context = set_forward_context(
                dict.fromkeys(self.names, metadata),
                self.vllm_config,
                num_tokens=size,
                slot_mapping=dict.fromkeys(self.names, self.slots[:size]),
            )
            h = None if kind == 1 else self.h[:, :size]
            with context:
                x, h = self.run_loop(kind, self.loop, self.positions[:size], self.x[:size], h)
            put(x, self.x[:size])
            if self.h.numel():
                put(h, self.h[:, :size])
            return h

        return run

    def _batch(self, size: int, tokens: int, longest: int) -> CommonAttentionMetadata:
        """State `size` sequences of one token each, of which the first `tokens` are there."""
        return CommonAttentionMetadata(
            query_start_loc=self.query_starts[: size + 1],
            query_start_loc_cpu=torch.from_numpy(np.minimum(np.arange(size + 1, dtype=np.int32), tokens)),
            seq_lens=self.seq_lens[:size],
            seq_lens_cpu_upper_bound=torch.full((size,), longest, dtype=torch.int32),
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=longest,
            block_table_tensor=self.blocks[:size],
            slot_mapping=self.slots[:size],
            causal=True,
            positions=self.positions[:size],
        )


def put(values: Tensor, buffer: Tensor) -> None:
    """Copy values to a buffer, unless they lie there already."""
    if values.data_ptr() != buffer.data_ptr():
        buffer.copy_(values)


def record(run: Callable[[], Any], vllm_config: VllmConfig) -> torch.cuda.CUDAGraph:
    """Capture what `run` launches."""
    graph = torch.cuda.CUDAGraph()
    pool = current_platform.get_global_graph_pool()
    with capture_pool(pool, vllm_config) as pool, torch.cuda.graph(graph, pool, stream=current_stream()):
        run()
    return graph
