"""The serving contract on a server: the same answers alone, together, from the prefix cache, and preempted."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

from openai import APIStatusError

from melt_serve.config import MeltConfig
from melt_serve.verify.client import Answer, Asked
from melt_serve.verify.parity import distance
from melt_serve.verify.record import Check
from melt_serve.verify.served import Served

PREEMPTIONS = "vllm:num_preemptions_total"
HITS = "vllm:prefix_cache_hits_total"
STEPS = "vllm:iteration_tokens_total_count"
TIMES_ASKED = 20
FINAL_ROWS = "melt_kv_final_rows_bytes"
OVERBOOKED = 1.6
"""How many times the cache the crowd's requests would fill."""
MOST_REQUESTS = 64
WRONG_DEPTHS: Sequence[dict[str, object]] = (
    {"loops": 0},
    {"loops": -1},
    {"loops": "two"},
    {"loops": 1.5},
    {"exit_threshold": 0},
    {"exit_threshold": 1.5},
)
SYNC_WARNINGS = ("called a synchronizing CUDA operation", "GPU<->CPU sync detected")
"""What vLLM writes where VLLM_GPU_SYNC_CHECK is set."""


def check_contract(served: Served, tolerance: float) -> Iterator[Check]:
    """Ask every request alone, then in other company; each answer must be that of the request alone."""
    crowd = requests(served)
    few = crowd[: max(2, int(capacity(served) // blocks(served, crowd[0])))]
    alone = [served.client.complete(asked, f"alone {number}") for number, asked in enumerate(crowd)]
    together = served.client.complete_at_once(few, "together")
    depths = len({str(asked.depth) for asked in few})
    yield same_answers(f"{len(few)} requests at {depths} depths together as alone", alone, together, tolerance)

    before = served.client.metrics()
    again = served.client.complete_at_once(few, "together")
    hits = int(served.client.metrics()[HITS] - before[HITS])
    yield same_answers("from the prefix cache as alone", alone, again, tolerance, hits, "prefix tokens found")

    before = served.client.metrics()
    crowded = served.client.complete_at_once(crowd, "crowd")
    preempted = int(served.client.metrics()[PREEMPTIONS] - before[PREEMPTIONS])
    yield same_answers(
        f"{len(crowd)} requests in a scarce cache as alone", alone, crowded, tolerance, preempted, "preemptions"
    )
    yield check_given_back(served)


def requests(served: Served) -> list[Asked]:
    """Make more requests than fit into the cache at once, of mixed lengths and depths; all fit when they begin."""
    block, target = served.block_size, served.target
    prompt, generated = block + block // 2, block if target.quick else 2 * block
    depths = cycle(served.depths.values())
    asked: list[Asked] = []
    room = OVERBOOKED * capacity(served)
    while len(asked) < MOST_REQUESTS and (room > 0 or len(asked) < 4):
        number = len(asked)
        asked.append(Asked(target.window(100 + number, prompt + number % 7 - 3), generated, next(depths)))
        room -= blocks(served, asked[-1])
    return asked


def capacity(served: Served) -> int:
    """Return the KV blocks that requests may have."""
    return served.info["kv_capacity_tokens"] // served.block_size - 1


def blocks(served: Served, asked: Asked) -> int:
    """Return the KV blocks that a request takes in the end, those of its open chunk not counted."""
    return -(-(len(asked.prompt) + asked.tokens) // served.block_size)


def same_answers(
    name: str,
    alone: Sequence[Answer],
    answers: Sequence[Answer],
    tolerance: float,
    events: int | None = None,
    kind: str = "",
) -> Check:
    """Judge answers against those of the same requests alone, and that what the scene is about took place.

    Args:
        events: how often it took place; None if there is nothing to count.
        kind: what it is called.
    """
    apart, same, tokens = 0.0, 0, 0
    for one, other in zip(alone, answers, strict=False):
        tokens += len(one.tokens)
        for place, (here, there) in enumerate(zip(one.rows, other.rows, strict=True)):
            apart = max(apart, distance(here, there))
            same += one.tokens[place] == other.tokens[place]
            if one.tokens[place] != other.tokens[place]:
                break  # from here on they answer different texts
    measured = f"{apart:.4f} apart in probability, {same} of {tokens} tokens the same"
    expected = f"at most {tolerance:.4f}"
    if events is not None:
        measured, expected = f"{measured}, {events:,} {kind}", f"{expected}, some {kind}"
    right = apart <= tolerance and events != 0
    return Check.judge(name, right, measured, expected, distance=apart, tolerance=tolerance, events=events)


def check_given_back(served: Served) -> Check:
    """Check that no request holds KV blocks once all are answered."""
    deadline = time.monotonic() + 5
    while (now := served.client.info()["now"])["kv_in_use_bytes"] and time.monotonic() < deadline:
        time.sleep(0.2)
    held = now["kv_in_use_bytes"]
    return Check.judge("KV blocks after all answers", not held, f"{held:,} bytes in use", "0 bytes", held_bytes=held)


def check_wrong_depths(served: Served) -> Check:
    """Check that depths that the checkpoint does not run are refused, in OpenAI's shape of an error."""
    prompt, wrong = served.target.window(0, 4), []
    for depth in (*WRONG_DEPTHS, {"loops": served.target.most_loops + 1}):
        try:
            served.client.complete(Asked(prompt, 1, depth), "wrong")  # type: ignore[arg-type]
            wrong.append(f"{depth} was answered")
        except APIStatusError as error:
            body = error.body
            shaped = isinstance(body, dict) and {"message", "type", "code"} <= body.keys()
            if error.status_code != 400 or not shaped:
                wrong.append(f"{depth} got a {error.status_code}{'' if shaped else ' without an error object'}")
    asked = len(WRONG_DEPTHS) + 1
    return Check.judge("wrong depths refused", not wrong, "; ".join(wrong) or f"{asked} of {asked}", "each a 400")


def check_flat_memory(served: Served) -> Check:
    """Check that a request's final rows take as many bytes as planned, at one and at the most loops.

    A MELT's are the same. Of a LoopLM the most loops are planned, and fewer take no more. Prompt and answer end in the
    same KV block, so what is held does not change while the answer is made.
    """
    flat = isinstance(served.target.config, MeltConfig)
    most, block = served.target.most_loops, served.block_size
    prompt = served.target.window(50, 2 * block + 1)
    expected = 3 * block * served.info["kv_bytes_per_token"]
    held = {}
    for loops in (1, most):
        asked = Asked(prompt, block - 1, {"loops": loops})
        seen = [0.0]
        for _ in range(TIMES_ASKED):  # an answer may be whole before its rows are seen
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(served.client.complete, asked, f"{loops} loops")
                while not answer.done():
                    seen.append(served.client.metrics().get(FINAL_ROWS, 0.0))
                answer.result()
            if any(seen):
                break
        held[loops] = int(max(seen))
    least = expected if flat else 1
    return Check.judge(
        f"KV bytes of final rows, {'the same at all' if flat else 'as planned at the most'} loops",
        held[most] == expected and least <= held[1] <= expected,
        ", ".join(f"{bytes_held:,} at {loops}" for loops, bytes_held in held.items()),
        f"{expected:,} for {3 * block} tokens",
        bytes_by_loops={str(loops): bytes_held for loops, bytes_held in held.items()},
    )


def check_no_waits(served: Served) -> Check:
    """Check that the host waits for the device in no step, where no token may leave early."""
    name = "steps in which the host waits for the device"
    if served.info["device"] != "cuda":
        return Check.skip(name, f"nothing to wait for on a {served.info['device'].upper()}")
    size, before = served.log.stat().st_size, served.client.metrics()
    served.client.complete_at_once(requests(served)[:8], "waits", logprobs=None)
    steps = int(served.client.metrics()[STEPS] - before[STEPS])
    with served.log.open(errors="replace") as log:
        log.seek(size)
        waits = [line for line in log if any(warning in line for warning in SYNC_WARNINGS)]
    first = f", the first: {waits[0].strip()}" if waits else ""
    return Check.judge(
        name, not waits, f"{len(waits)} waits in {steps} steps{first}", "0", waits=len(waits), steps=steps
    )
