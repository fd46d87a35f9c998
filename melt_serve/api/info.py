"""Facts for people and scripts: what is served, how many loops it may run, and what its cache holds now."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Literal

from prometheus_client.samples import Sample
from pydantic import BaseModel
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.metrics.prometheus import get_prometheus_registry

from melt_serve.api.metrics import capacity_tokens, row_bytes, row_dtype
from melt_serve.config import DecodeMode, LoopLMConfig, MeltConfig


class Now(BaseModel):
    """What changes while the server runs, of all its engines and API processes together.

    Attributes:
        running, waiting: requests.
        kv_in_use_bytes: KV blocks of running requests; cached blocks that may be evicted do not count.
        kv_open_bytes: of these, rows of open chunks that are kept for single loops (`chunk` mode).
        kv_looplm_bytes: what a LoopLM would need for the same tokens at the same loops.
        requests_by_loops: requests so far, by the loops that their tokens may run.
        tokens_by_loops: generated tokens of finished requests, by the loops that they ran at most; the numbers
            between two keys belong to the larger one.
    """

    running: int
    waiting: int
    kv_in_use_bytes: int
    kv_open_bytes: int
    kv_looplm_bytes: int
    requests_by_loops: dict[int, int]
    tokens_by_loops: dict[int, int]


class Info(BaseModel):
    """The answer of `GET /melt/info`; all but `now` stays as it is while the server runs.

    Attributes:
        models: the names it is served under.
        max_model_len: the most tokens of a prompt and its answer.
        default_loops: T of requests that ask for none.
        max_loops: the most loops a request may ask for.
        effort_loops: the loops that each `reasoning_effort` of OpenAI's asks for.
        exit_threshold: of requests that name none; at 1 no token leaves its loops early.
        kv_bytes_per_token: final rows of one token, over all layers of all devices; a LoopLM's at the default loops.
        looplm_kv_bytes_per_token: the same of a LoopLM of this shape that runs the default loops.
        kv_capacity_tokens: such tokens that the KV cache has room for, on each data-parallel rank.
        kv_block_size: tokens in a KV block.
        device: what the engine runs on, such as `cuda` or `cpu`.
        model_runner: vLLM's, `V1` or `V2`.
        compilation: vLLM's compilation mode; `NONE` is eager.
        cuda_graphs: vLLM's mode of CUDA graphs; `NONE` are none.
    """

    models: list[str]
    architecture: str
    layers: int
    hidden_size: int
    dtype: str
    max_model_len: int
    decode_mode: DecodeMode | None = None
    chunk_size: int | None = None
    default_loops: int
    max_loops: int
    effort_loops: dict[str, int]
    exit_threshold: float
    kv_dtype: str
    kv_bytes_per_token: int
    looplm_kv_bytes_per_token: int
    kv_capacity_tokens: int
    kv_block_size: int
    device: str
    model_runner: Literal["V1", "V2"]
    compilation: str
    cuda_graphs: str
    now: Now | None = None


def lasting_facts(vllm_config: VllmConfig) -> Info:
    """Return the lasting facts, from the configuration of an engine that knows its cache."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    compilation = vllm_config.compilation_config
    config: LoopLMConfig = model.hf_config
    own = row_bytes(vllm_config)
    names = model.served_model_name
    info = Info(
        models=[names] if isinstance(names, str) else list(names),
        architecture=model.architecture,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_model_len,
        default_loops=config.total_ut_steps,
        max_loops=config.most_loops,
        effort_loops=config.loops_by_effort,
        exit_threshold=config.early_exit_threshold,
        kv_dtype=row_dtype(vllm_config),
        kv_bytes_per_token=own,
        looplm_kv_bytes_per_token=own,
        kv_capacity_tokens=capacity_tokens(vllm_config),
        kv_block_size=cache.block_size,
        device=current_platform.device_type,
        model_runner="V2" if vllm_config.use_v2_model_runner else "V1",
        compilation=compilation.mode.name,
        cuda_graphs=compilation.cudagraph_mode.name,
    )
    if isinstance(config, MeltConfig):
        info.decode_mode = config.decode_mode
        info.chunk_size = config.chunk_size
        info.looplm_kv_bytes_per_token = own * config.total_ut_steps
    return info


def read_metrics(info: Info) -> Now:
    """Read what changes from the server's own metrics."""
    capacity = info.kv_capacity_tokens * info.kv_bytes_per_token
    totals: defaultdict[str, float] = defaultdict(float)
    requests: Counter[int] = Counter()
    up_to: defaultdict[float, float] = defaultdict(float)
    for sample in samples():
        totals[sample.name] += sample.value
        if sample.name == "melt_requests_total":
            requests[int(sample.labels["loops"])] += int(sample.value)
        elif sample.name == "melt_token_loops_bucket":
            up_to[float(sample.labels["le"])] += sample.value
    in_use = round(totals["vllm:kv_cache_usage_perc"] * capacity)
    edges = sorted(up_to)
    below = [0, *(up_to[edge] for edge in edges)]
    tokens = {edge: int(up_to[edge] - less) for edge, less in zip(edges, below, strict=False)}
    return Now(
        running=int(totals["vllm:num_requests_running"]),
        waiting=int(totals["vllm:num_requests_waiting"]),
        kv_in_use_bytes=in_use,
        kv_open_bytes=int(totals["melt_kv_open_rows_bytes"]),
        kv_looplm_bytes=int(totals["melt_kv_looplm_bytes"]),
        requests_by_loops=dict(sorted(requests.items())),
        tokens_by_loops={int(min(edge, info.max_loops)): count for edge, count in tokens.items() if count},
    )


def samples() -> Iterator[Sample]:
    """Yield the samples of all metrics, over all API processes."""
    for metric in get_prometheus_registry().collect():
        yield from metric.samples
