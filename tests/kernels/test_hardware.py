"""On a GPU: a captured kernel replays on new values, so nothing in it waits for the host or depends on it."""

import torch

from melt_serve.kernels.gate import gate_blend
from melt_serve.kernels.rows import write_rows
from tests.kernels.device import needs_gpu
from tests.kernels.test_rows import Case

pytestmark = needs_gpu


def captured(run):
    run()  # compile first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@torch.no_grad()
def test_the_gate_in_a_cuda_graph():
    from_input, from_state, h, n = torch.randn(4, 64, 2048, device="cuda", dtype=torch.bfloat16)
    state = h.clone()
    graph = captured(lambda: gate_blend(from_input, from_state, n[0], state, n, out=state))
    for fresh in (h, n):
        state.copy_(fresh)
        graph.replay()
        assert torch.equal(state, gate_blend(from_input, from_state, n[0], fresh, n))


def test_rows_in_a_cuda_graph():
    case, other = (Case(torch.bfloat16, torch.float8_e4m3fn) for _ in range(2))
    slots, q = torch.tensor([17, -1, 3, 0, -1, 19], device="cuda"), case.q.clone()
    graph = captured(lambda: write_rows(case.into(slots)))
    for fresh in ([17, -1, 3, 0, -1, 19], [1, 2, -1, -1, 8, 9]):
        slots.copy_(torch.tensor(fresh))
        case.q.copy_(q)
        other.q.copy_(q)
        graph.replay()
        other.write(fresh)
        assert torch.equal(case.q, other.q)
        rows = [each.memory.float().flatten(0, 1) for each in (case, other)]
        written = [slot for slot in fresh if slot >= 0]
        assert torch.equal(rows[0][written], rows[1][written])
