"""Every place where vLLM 0.32 itself is changed, and why.

`sleep_while_waiting` and `fit_queues_into_shared_memory` concern every model that vLLM serves, the others ours.
A patch that no longer fits raises: better no server than one that breaks the contract silently.
"""

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from melt_serve.engine import usage
from melt_serve.engine.depth import EFFORT, depth_of, resolve_depth

SHARED_MEMORY = Path("/dev/shm")
SHARE_OF_A_QUEUE = 16
"""A queue that is made to fit takes one part in so many of what is free: there is one for each worker, and one more."""


def apply() -> None:
    """Apply all patches, once in a process.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    _replace(EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args", _raise_unset_budget)
    _replace(InputProcessor, "process_inputs", _resolve_depth)
    for request in (ChatCompletionRequest, ResponsesRequest):
        _replace(request, "to_sampling_params", _forward_effort)
    _replace(OutputProcessor, "process_outputs", _record_loops)
    _replace(OpenAIServingChat, "chat_completion_full_generator", usage.wrap_chat_response)
    _replace(OpenAIServingChat, "chat_completion_stream_generator", usage.wrap_stream(results_at=1))
    _replace(OpenAIServingCompletion, "request_output_to_completion_response", usage.wrap_completions)
    _replace(OpenAIServingCompletion, "completion_stream_generator", usage.wrap_stream(results_at=2))
    _replace(OpenAIServingResponses, "responses_full_generator", usage.wrap_responses)
    _replace(BeamSearchOnlineMixin, "beam_search", _refuse_beam_search)
    _replace(BeamSearchOfflineMixin, "beam_search", _refuse_beam_search)


def sleep_while_waiting() -> None:
    """Let vLLM's processes sleep, not yield, while they wait for each other on a CPU.

    They poll shared memory with `os.sched_yield()`. That keeps a core busy that others need, and on Linux 6.18 whoever
    shares the core with such a loop can starve: a thread that sends tokens to clients got no time until the answer was
    complete, and a second server on two cores did not start. A poll now takes 0.1 ms; a step on a CPU takes 2 or more.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.distributed import utils
    from vllm.platforms import current_platform

    if not hasattr(utils, "USE_SCHED_YIELD"):
        raise RuntimeError("melt-serve cannot patch vllm.distributed.utils.USE_SCHED_YIELD: this vLLM does not have it")
    if current_platform.is_cpu():
        utils.USE_SCHED_YIELD = False


def fit_queues_into_shared_memory() -> None:
    """Let the queues between vLLM's processes be as small as `/dev/shm` asks for.

    vLLM reserves 160 and 240 MiB for them, of which 80 KiB are used, and does not start with less: Docker gives a
    container 64 MiB. A message that is larger than a slot of its queue goes through a socket, as it does in vLLM.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    _replace(ShmRingBuffer, "__init__", _fitting_queue)


def _fitting_queue(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, n_reader: int, max_chunk_bytes: int, max_chunks: int, name: str | None = None) -> None:
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else sys.maxsize
        if name is None and max_chunk_bytes * max_chunks > free:
            max_chunk_bytes = free // SHARE_OF_A_QUEUE // max_chunks
        original(self, n_reader, max_chunk_bytes, max_chunks, name)

    init.melt_serve = True  # type: ignore[attr-defined]
    return init


def capture_no_whole_step(model_state: type) -> None:
    """Keep vLLM from capturing CUDA graphs of a MELT's whole step; graphs of one loop are captured right after.

    It picks a whole step's graph by its number of tokens alone, and replays it without the model's forward: a request
    would get the default depth, whatever it asks for. For the processes that run the model.

    Args:
        model_state: the class of the models that this concerns.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    def unless_melt(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def capture(self: Any, model: Any, state: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(state, model_state):
                original(self, model, state, *args, **kwargs)

        capture.melt_serve = True  # type: ignore[attr-defined]
        return capture

    _replace(ModelCudaGraphManager, "capture", unless_melt)


def report_loops_run(model_state: type[Any]) -> None:
    """Let vLLM's GPU runner state, with each step's output, the loops that ran for every sampled token.

    It has no hook between a step and its output. The numbers are the host's, and ride on the output of their own step:
    the next one may be under way before it is read. For the processes that run the model.

    Args:
        model_state: the class of the models that this concerns; its `token_loops` is of the step that ran last.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def reporting(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            if output is not None and isinstance(self.model_state, model_state):
                output.model_runner_output.token_loops = self.model_state.token_loops()
            return output

        sample_tokens.melt_serve = True  # type: ignore[attr-defined]
        return sample_tokens

    _replace(GPUModelRunner, "sample_tokens", reporting)


def resolve_depths_in_the_engine() -> None:
    """Resolve the depth of requests that come past `InputProcessor`, as from a front end without this plugin.

    One without a depth gets the checkpoint's own. An invalid one raises where vLLM ends that request with an error; in
    the scheduler it would end the engine. For the engine's process.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.engine.core import EngineCore

    _replace(EngineCore, "preprocess_add_request", _resolve_late)


def _resolve_late(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        model_config = self.vllm_config.model_config
        if _is_melt(model_config):
            request.sampling_params = resolve_depth(request.sampling_params, model_config.hf_config)
        return original(self, request)

    preprocess_add_request.melt_serve = True  # type: ignore[attr-defined]
    return preprocess_add_request


def keep_an_empty_adapter_slot() -> None:
    """Let requests without a LoRA adapter have none on a CPU, also in a batch with others that have one.

    They have slot -1, which vLLM's CPU kernels take for the last slot (vLLM pull requests 48421 and 49656,
    open at 0.32). With one slot more than adapters, that one is always empty. The worker calls this, when it
    loads our models.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.lora import model_manager

    _replace(model_manager, "from_layer", _one_slot_more)


def _one_slot_more(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_layer(layer: Any, max_loras: int, *args: Any, **kwargs: Any) -> Any:
        return original(layer, max_loras + 1, *args, **kwargs)

    from_layer.melt_serve = True  # type: ignore[attr-defined]
    return from_layer


def _replace(owner: type | ModuleType, name: str, wrap: Callable[[Any], Any]) -> None:
    original = owner.__dict__.get(name)
    if original is None:
        raise RuntimeError(f"melt-serve cannot patch {owner.__name__}.{name}: this vLLM does not have it")
    if not getattr(original, "melt_serve", False):
        setattr(owner, name, wrap(original))


def _is_melt(model_config: ModelConfig) -> bool:
    return getattr(model_config.hf_config, "model_type", None) == "melt"


def _raise_unset_budget(original: Callable[..., None]) -> Callable[..., None]:
    # A chunk of a prompt and a token of every running request fit in a step, whatever C is. The hook for a
    # model's configuration is called later, and cannot tell a default from a user's choice.
    @functools.wraps(original)
    def set_defaults(self: EngineArgs, usage: Any, model_config: ModelConfig, *args: Any) -> None:
        unset = self.max_num_batched_tokens is None
        original(self, usage, model_config, *args)
        if unset and _is_melt(model_config):
            floor = model_config.hf_config.chunk_size + self.max_num_seqs
            self.max_num_batched_tokens = max(self.max_num_batched_tokens, floor)

    set_defaults.melt_serve = True  # type: ignore[attr-defined]
    return set_defaults


RESUMABLE_REFUSED = (
    "MELT cannot resume a session with streamed inputs: in token mode its prompt would be cut elsewhere, "
    "in chunk mode it is not proved; send the whole prompt as one request"
)


def _resolve_depth(original: Callable[..., Any]) -> Callable[..., Any]:
    # Every request passes here, however vLLM is run, and an error raised here becomes a 400.
    @functools.wraps(original)
    def process_inputs(
        self: InputProcessor,
        request_id: str,
        prompt: Any,
        params: Any,
        *args: Any,
        resumable: bool = False,
        **kwargs: Any,
    ) -> Any:
        if _is_melt(self.model_config):
            if resumable:  # its next input would continue a prompt inside a chunk whose rows are final already
                raise VLLMValidationError(RESUMABLE_REFUSED)
            params = resolve_depth(params, self.model_config.hf_config)
            usage.REQUESTS.labels(depth_of(params).loops).inc()
        return original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)

    process_inputs.melt_serve = True  # type: ignore[attr-defined]
    return process_inputs


def _record_loops(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(self: OutputProcessor, outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        usage.record_finished(outputs, self.request_states)
        return original(self, outputs, *args, **kwargs)

    process_outputs.melt_serve = True  # type: ignore[attr-defined]
    return process_outputs


def _forward_effort(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    # vLLM gives OpenAI's reasoning_effort to the chat template only.
    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = original(self, *args, **kwargs)
        reasoning = getattr(self, "reasoning", None)  # the Responses API's
        effort = reasoning.effort if reasoning is not None else getattr(self, "reasoning_effort", None)
        if effort is not None:
            params.extra_args = {**(params.extra_args or {}), EFFORT: effort}
        return params

    to_sampling_params.melt_serve = True  # type: ignore[attr-defined]
    return to_sampling_params


BEAM_SEARCH_REFUSED = (
    "MELT in token mode has no beam search: vLLM sends every beam's generated tokens back as a prompt, "
    "which would be cut into other chunks; use n with temperature instead"
)


def _refuse_beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    # Raised when it is called, not when it is iterated: by then a streamed answer has begun with a 200.
    @functools.wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        model_config = getattr(self, "engine_client", self).model_config
        if _is_melt(model_config) and model_config.hf_config.decode_mode == "token":
            raise VLLMValidationError(BEAM_SEARCH_REFUSED, parameter="use_beam_search", value=True)
        return original(self, *args, **kwargs)

    beam_search.melt_serve = True  # type: ignore[attr-defined]
    return beam_search
