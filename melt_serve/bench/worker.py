"""The child process of `engine.py`: one vLLM engine, and what can be asked of it.

A question is a line of JSON on the standard input, `[function, arguments]`; an answer is a line on the standard output.
"""

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

# Scheduler, worker and model in this very process, where they can be read, timed and profiled.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams, TokensPrompt


def main() -> None:
    """Start the engine as the first question says, then answer until the other end is closed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    questions: queue.Queue[str] = queue.Queue()
    threading.Thread(target=listen, args=(questions,), daemon=True).start()
    llm: Any = None
    while True:
        what, facts = json.loads(questions.get())
        try:
            if what == "start":
                llm, answer = start(**facts), None
            else:
                answer = QUESTIONS[what](llm, **facts)
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        else:
            answers.write(json.dumps({"answer": answer}) + "\n")


def listen(questions: "queue.Queue[str]") -> None:
    """Take questions while others are answered; end the process, whatever it does, when the other end is closed."""
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)


def start(path: str, arguments: dict[str, Any]) -> "LLM":
    """Start vLLM on the config at `path`, with random weights from a fixed seed unless `arguments` say otherwise."""
    import torch
    from vllm import LLM

    defaults = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        # A CPU compiles for a minute and gains little; on a GPU eager layers would measure the launch of kernels.
        "enforce_eager": not torch.cuda.is_available(),
        # Two engines share the device. The cache's bytes are given, so this is only what must be free at a start.
        "gpu_memory_utilization": 0.4,
        "distributed_executor_backend": "uni",
    }
    return LLM(path, **{**defaults, **arguments})


def memory(llm: "LLM", prompt: int) -> dict[str, object]:
    """Read what the engine's cache holds and costs, and the process's peak after a step of `prompt` tokens. Bytes.

    Everything about the cache is read from what the engine has allocated and accounts with.
    """
    import torch

    from melt_serve.device import peak_memory

    vllm_config = llm.llm_engine.vllm_config
    runner = model_runner(llm)
    _, *open_rows = runner.kv_cache_config.kv_cache_groups
    config = vllm_config.model_config.hf_config
    depths = sorted({1 << power for power in range(config.total_ut_steps.bit_length())} | {config.total_ut_steps})
    held = {
        loops: rows_held(llm, requests=1, prompt=prompt, generated=1, seed=loops, loops=[loops])["kv_bytes_per_token"]
        for loops in depths
    }
    # A MELT's h of every layer lives through all loops of a step; a LoopLM has none.
    state = vllm_config.scheduler_config.max_num_batched_tokens * config.num_hidden_layers * config.hidden_size
    return {
        "kv_bytes_per_token": held[config.total_ut_steps],
        "kv_bytes_by_loops": {str(loops): held_bytes for loops, held_bytes in held.items()},
        "open_chunk_bytes": sum(
            group.kv_cache_spec.max_memory_usage_bytes(vllm_config) * len(group.layer_names) for group in open_rows
        ),
        "token_capacity": vllm_config.cache_config.kv_cache_size_tokens,
        "max_concurrency": vllm_config.cache_config.kv_cache_max_concurrency,
        "peak_bytes": peak_memory(torch.device("cpu")),
        "transient_bytes": state * runner.dtype.itemsize if config.model_type == "melt" else 0,
    }


def model_runner(llm: "LLM") -> Any:
    """Return the engine's model runner, which is in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def block_bytes(runner: Any) -> int:
    """Return the bytes that a block of the pool takes in the allocated tensors, over all layers."""
    storages = {rows.untyped_storage().data_ptr(): rows.untyped_storage().nbytes() for rows in runner.kv_caches}
    return sum(storages.values()) // runner.kv_cache_config.num_blocks


def generate(
    llm: "LLM", requests: int, prompt: int, generated: int, seed: int, loops: Sequence[int] | None = None
) -> float:
    """Serve greedy requests of random prompts, all there from the start; return the seconds it took.

    Args:
        llm: the engine.
        requests: how many.
        prompt: tokens each.
        generated: tokens each, whatever they are.
        seed: of the prompts. Another seed shares no prefix.
        loops: of each request; None for the checkpoint's own.
    """
    prompts, sampling = draw_requests(llm, requests, prompt, generated, seed, loops)
    started = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - started


def draw_requests(
    llm: "LLM", requests: int, prompt: int, generated: int, seed: int, loops: Sequence[int] | None
) -> "tuple[list[TokensPrompt], list[SamplingParams]]":
    """Draw the requests of `generate`: random prompts, and how each is sampled."""
    import torch
    from vllm import SamplingParams, TokensPrompt

    vocabulary = llm.llm_engine.vllm_config.model_config.hf_config.vocab_size
    tokens = torch.randint(vocabulary, (requests, prompt), generator=torch.Generator().manual_seed(seed))
    prompts = [TokensPrompt(prompt_token_ids=row) for row in tokens.tolist()]
    extra = [{"loops": each} for each in loops] if loops else [None] * requests
    sampling = [
        SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False, extra_args=each)
        for each in extra
    ]
    return prompts, sampling


def latency(llm: "LLM", prompt: int, generated: int, seed: int, loops: int) -> float:
    """Measure the seconds between two generated tokens of a request that is alone, by vLLM's own clock."""
    prompts, sampling = draw_requests(llm, 1, prompt, generated, seed, [loops])
    (output,) = llm.generate(prompts, sampling, use_tqdm=False)
    assert output.metrics is not None, "the engine keeps no statistics"
    return (output.metrics.last_token_ts - output.metrics.first_token_ts) / (generated - 1)


def rows_held(llm: "LLM", **facts: Any) -> dict[str, int]:
    """Count what the rows of `generate`'s requests take of the cache while they are served. Bytes."""
    return held_during(llm, lambda: generate(llm, **facts))


def held_during(llm: "LLM", work: Callable[[], object]) -> dict[str, int]:
    """Count what requests' rows take of the cache while some work is done, without a prefix cache. Bytes.

    Counted in every step, once it has its blocks. Final rows are all blocks that the pool has given away but
    for the open chunks', at their peak, over the tokens that are there, in whole blocks: a second row of a token
    would be seen. Open rows are the most that one request held of all loops before its last.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    final, *open_rows = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool = scheduler.kv_cache_manager.block_pool
    schedule, steps = scheduler.schedule, []

    def counted(*arguments: Any) -> object:
        step = schedule(*arguments)
        held = [
            sum(len(rows.req_to_blocks.get(request.request_id, ())) for rows in open_rows)
            for request in scheduler.running
        ]
        given = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # nobody may have the null block
        needed = sum(math.ceil(request.num_computed_tokens / final.block_size) for request in scheduler.running)
        steps.append((given - sum(held), needed * final.block_size, max(held, default=0)))
        return step

    scheduler.schedule = counted
    try:
        work()
    finally:
        del scheduler.schedule
    block = block_bytes(model_runner(llm))
    blocks, tokens, _ = max(steps, key=lambda step: step[0])
    return {"kv_bytes_per_token": blocks * block // tokens, "open_chunk_bytes": max(step[2] for step in steps) * block}


def ask_questions(llm: "LLM", questions: int, loops: int, exit_threshold: float) -> dict[str, float]:
    """Ask the first held-out questions at this depth, greedily, as `accuracy.Answers` has it."""
    from vllm import SamplingParams, TokensPrompt

    from melt_serve.engine.usage import LoopUsage
    from melt_serve.task.evaluate import heldout, longest_reply
    from melt_serve.task.tokenizer import prompt_ids

    asked, tokenizer = heldout(questions), llm.get_tokenizer()
    prompts = [TokensPrompt(prompt_token_ids=prompt_ids(question, tokenizer)) for question in asked]
    depth = {"loops": loops, "exit_threshold": exit_threshold}
    sampling = SamplingParams(temperature=0, max_tokens=longest_reply(tokenizer), extra_args=depth)
    outputs: list[Any] = []
    started = time.perf_counter()
    held = held_during(llm, lambda: outputs.extend(llm.generate(prompts, sampling, use_tqdm=False)))
    seconds = time.perf_counter() - started
    ran = LoopUsage()
    for number, output in enumerate(outputs):
        ran.add(output, number)
    assert ran.summary is not None
    replies = [output.outputs[0] for output in outputs]
    right = [question.check(each.text.partition("</think>")[2]) for question, each in zip(asked, replies, strict=True)]
    return {
        "right": sum(right) / len(right),
        "mean_loops": ran.summary["mean"],
        "tokens_per_second": sum(len(each.token_ids) for each in replies) / seconds,
        "kv_bytes_per_token": held["kv_bytes_per_token"],
    }


def answer_in_crowds(llm: "LLM", first: int, questions: int, requests: int) -> dict[str, float]:
    """Ask held-out questions from the `first` one on, so many `requests` at a time, as `speculation.Round` has it."""
    from vllm import SamplingParams, TokensPrompt

    from melt_serve.task.evaluate import heldout, longest_reply
    from melt_serve.task.tokenizer import prompt_ids

    tokenizer = llm.get_tokenizer()
    asked = [TokensPrompt(prompt_token_ids=prompt_ids(each, tokenizer)) for each in heldout(first + questions)[first:]]
    sampling = SamplingParams(temperature=0, max_tokens=longest_reply(tokenizer))
    before, tokens, started = draft_counts(llm), 0, time.perf_counter()
    for begin in range(0, questions, requests):
        outputs = llm.generate(asked[begin : begin + requests], sampling, use_tqdm=False)
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    seconds = time.perf_counter() - started
    counts = {name: count - before[name] for name, count in draft_counts(llm).items()}
    return {"seconds": seconds, "tokens": tokens, **counts}


def draft_counts(llm: "LLM") -> dict[str, int]:
    """Return how often the engine has drafted, how many tokens, and how many of these were accepted."""
    names = {
        "steps": "vllm:spec_decode_num_drafts",
        "drafted": "vllm:spec_decode_num_draft_tokens",
        "accepted": "vllm:spec_decode_num_accepted_tokens",
    }
    counted = {each.name: each.value for each in llm.get_metrics() if each.name in names.values()}
    return {name: counted.get(metric, 0) for name, metric in names.items()}


def requests_that_fit(llm: "LLM") -> float:
    """Return how many requests of the greatest length the cache holds at once."""
    return float(llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency)


def profile(llm: "LLM", **facts: Any) -> dict[str, float]:
    """Measure the seconds of one `generate`, by part of the model."""
    from melt_serve.bench import profiler

    runner = model_runner(llm)
    return profiler.profile([runner.get_model(), runner.sampler], lambda: generate(llm, **facts))


QUESTIONS: dict[str, Callable[..., object]] = {
    "memory": memory,
    "generate": generate,
    "latency": latency,
    "rows_held": rows_held,
    "ask_questions": ask_questions,
    "answer_in_crowds": answer_in_crowds,
    "requests_that_fit": requests_that_fit,
    "profile": profile,
}

if __name__ == "__main__":
    main()
