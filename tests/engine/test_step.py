"""What is left of a step's sequences when tokens leave, held against the same said one token at a time."""

import numpy as np
import pytest

from melt_serve.engine.step import Sequences


@pytest.mark.parametrize("bridge", [True, False], ids=["bridged", "cut"])
@pytest.mark.parametrize("seed", range(20))
def test_each_request_keeps_the_queries_from_its_first_to_its_last_token_that_runs_or_is_cut_at_gaps(seed, bridge):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, size=1 + seed % 4)
    bounds = np.append(0, np.cumsum(lengths)).astype(np.int32)
    ends = lengths + random.integers(0, 99, size=len(lengths))
    tokens = np.arange(bounds[-1], dtype=np.int32)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    left = Sequences(np.arange(len(lengths)), bounds[:-1], bounds, ends, tokens)
    while len(tokens):
        assert left.tokens.tolist() == tokens.tolist() and left.size == len(tokens)
        assert left.of_tokens(left.requests).tolist() == owners[tokens].tolist()
        gaps = np.zeros(len(tokens) - 1, bool) if bridge else np.diff(tokens) > 1
        own = np.split(tokens, np.flatnonzero(gaps | (np.diff(owners[tokens]) > 0)) + 1)
        assert left.requests.tolist() == [owners[each[0]] for each in own]
        assert left.first.tolist() == [each[0] for each in own]
        assert np.diff(left.starts).tolist() == [each[-1] - each[0] + 1 for each in own]
        assert left.ends.tolist() == [
            ends[request] - (bounds[request + 1] - 1 - each[-1])
            for request, each in zip(left.requests, own, strict=True)
        ]
        assert left.has_gaps == any(each[-1] - each[0] >= len(each) for each in own)
        one = left.take_first(1)
        assert one.tokens.tolist() == own[0].tolist() and one.starts.tolist() == left.starts[:2].tolist()
        staying = np.flatnonzero(random.random(len(tokens)) < 0.7)
        if not len(staying):
            break
        left, tokens = left.take_tokens(staying, bridge), tokens[staying]
