"""Two norms and the sum between them, in one kernel, equal the readable formula."""

import pytest
import torch

from melt_serve.kernels.dispatch import KernelError, chosen
from melt_serve.kernels.norms import norm_add_norm, reference
from tests.kernels.device import DEVICE

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(1, 8), (7, 64), (17, 100), (3, 1026), (2, 1), (0, 8)]


def inputs(tokens, hidden, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (tokens, hidden), (tokens, hidden), (hidden,), (hidden,)
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def plain(x, residual, closing, opening, epsilon):
    """Return both results in float64, from the definition."""

    def norm(values, weight):
        return values / (values.square().sum(-1, keepdim=True) / values.shape[-1] + epsilon).sqrt() * weight

    x, residual, closing, opening = (each.double() for each in (x, residual, closing, opening))
    total = residual + norm(x, closing)
    return norm(total, opening), total


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_norm_add_norm_is_its_definition(tokens, hidden, dtype, epsilon):
    given = inputs(tokens, hidden, dtype)
    exact = plain(*given, epsilon)
    for computed, expected in zip(norm_add_norm(*given, epsilon), exact, strict=True):
        assert computed.dtype == dtype
        torch.testing.assert_close(computed.double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_rows_that_are_parts_of_wider_ones():
    x, residual, closing, opening = inputs(5, 24)
    wide = [torch.cat((each, each), dim=-1) for each in (x, residual)]
    expected = reference(x, residual, closing, opening, 1e-6)
    computed = norm_add_norm(*(each[:, :24] for each in wide), closing, opening, 1e-6)
    for one, other, before, whole in zip(computed, expected, (x, residual), wide, strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(whole[:, 24:], before)


def test_what_the_kernel_does_not_take_goes_to_what_runs_otherwise_or_is_refused():
    x, residual, closing, opening = inputs(3, 6)
    cases = {
        "not of one float dtype": (x, residual, closing.double(), opening),
        "not contiguous": (torch.randn(6, 3, device=DEVICE).T, residual, closing, opening),
    }
    for says, given in cases.items():
        if chosen() == "triton":
            with pytest.raises(KernelError, match=says):
                norm_add_norm(*given, 1e-6)
        elif DEVICE == "cpu":
            assert norm_add_norm(*given, 1e-6, otherwise=lambda *same: same) == (*given, 1e-6)
