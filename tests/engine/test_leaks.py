"""Nothing of a request stays behind it, wherever it was when it was cancelled."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from vllm import TokensPrompt
from vllm.v1.request import RequestStatus

from tests.engine.engines import everything, on, prompts, scheduler_of
from tests.engine.scenes import blocks_of_longest, confined, random_tokens

ROUNDS = 100
LONG = 300


def sizes(owner: Any, name: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Yield how much each container holds that an object of vLLM's or ours owns, itself or through others of them."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for attribute, value in vars(owner).items():
        own = f"{name}.{attribute}"
        if isinstance(value, dict | set | list | deque):
            yield own, len(value)
            members = value.values() if isinstance(value, dict) else value
        else:
            members = (value,)
        for member in list(members)[:20]:
            if type(member).__module__.startswith(("vllm.v1", "melt_serve")) and hasattr(member, "__dict__"):
                yield from sizes(member, own, seen)


def held(llm: Any) -> dict[str, int]:
    """Return what is held of requests on both sides of the engine, by the container's name."""
    live = llm.llm_engine
    assert live.reset_prefix_cache()
    core, runner = live.engine_core.engine_core, live.model_executor.driver_worker.worker.model_runner
    owners = {
        "scheduler": core.scheduler,
        "processor": live.output_processor,
        "input": live.input_processor,
        "batch": runner.input_batch,
    }
    seen: set[int] = set()
    found = {name: size for label, owner in owners.items() for name, size in sizes(owner, label, seen)}
    return {**found, "runner.requests": len(runner.requests)}


def cancel(llm: Any, *, among: set[RequestStatus] | None = None) -> int:
    """Cancel all requests, or those whose status is among these, as a server does; return how many.

    The server names a request as it was asked, with all its answers; vLLM keeps the record of a prompt with several
    answers if they are cancelled one by one.
    """
    requests, states = scheduler_of(llm).requests, llm.llm_engine.output_processor.request_states
    chosen = [key for key in requests if among is None or requests[key].status in among]
    parents = {key: states[key].parent_req for key in chosen}
    named = {key if (parent := parents[key]) is None else parent.request_id for key in chosen}
    llm.llm_engine.abort_request(sorted(named), internal=True)
    return len(chosen)


def play_and_cancel(llm: Any, number: int) -> dict[str, int]:
    """Ask, and cancel at every stage of a request's life; return how many were cancelled where."""
    live, scheduler = llm.llm_engine, scheduler_of(llm)
    done: dict[str, int] = {}

    def ask(count: int, length: int, **sampling: Any) -> None:
        for each in range(count):
            tokens = random_tokens(length, seed=1000 * number + each)
            parameters = everything(**{"max_tokens": 60, "logprobs": None, **sampling})
            live.add_request(f"{number}-{length}-{each}", TokensPrompt(prompt_token_ids=tokens), parameters)

    ask(10, 50)
    done["waiting"] = cancel(llm)
    with confined(scheduler, budget=97):
        ask(2, LONG)
        live.step()
        assert all(0 < request.num_computed_tokens < LONG for request in scheduler.running)
        done["prefill"] = cancel(llm)
    ask(2, 40, n=2, temperature=1.0, extra_args={"exit_threshold": 0.7})
    for _ in range(5 + number % 4):
        live.step()
    assert all(40 < request.num_tokens < 64 for request in scheduler.running), "the chunk of tokens 32 to 63 is open"
    done["decode, inside a chunk"] = cancel(llm)
    with confined(scheduler, blocks=blocks_of_longest(scheduler)):
        ask(4, 120, seed=1, temperature=1.0)
        for _ in range(80):
            live.step()
            if done.setdefault("preempted", cancel(llm, among={RequestStatus.PREEMPTED})):
                break
            del done["preempted"]
        done["after a preemption"] = cancel(llm)
    while live.has_unfinished_requests():
        live.step()
    live.step()  # tells the worker which requests are over
    return done


@on("token", "chunk")
def test_cancelled_requests_leave_nothing_behind(served):
    llm, _ = served
    for number in range(2):  # what is made once is made now
        assert all(play_and_cancel(llm, number).values())
    before, cancelled = held(llm), 0
    for number in range(2, ROUNDS):
        cancelled += sum(play_and_cancel(llm, number).values())
    after = held(llm)
    assert cancelled > 1500
    assert {name: (before.get(name), size) for name, size in after.items() if size > before.get(name, 0)} == {}
    (prompt,) = prompts(40)
    assert llm.generate(TokensPrompt(prompt_token_ids=prompt), everything(4), use_tqdm=False)
