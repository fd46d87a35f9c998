"""Every place where vLLM itself is changed, and why.

`sleep_while_waiting`, `start_beside_numba`, `fit_queues_into_shared_memory` and `stop_quietly` concern every model that
vLLM serves, the others ours. A patch that no longer fits raises: better no server than one that breaks the contract
silently.
"""

import functools
import inspect
import shutil
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.exceptions import VLLMClientError, VLLMError, VLLMValidationError
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.async_utils import cancel_task_threadsafe
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from melt_serve.answers import end_marks
from melt_serve.config import LoopLMConfig
from melt_serve.engine import lifeline, usage, versions
from melt_serve.engine.depth import EFFORT, RETURN_LOOPS, asked_of, resolve_depth

SHARED_MEMORY = Path("/dev/shm")
SHARE_OF_A_QUEUE = 16
"""A queue that is made to fit takes one part in so many of what is free: there is one for each worker, and one more."""


def apply() -> None:
    """Apply all patches, once in a process.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.v1.engine.async_llm import AsyncLLM

    _replace(EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args", _raise_unset_budget)
    _replace(InputProcessor, "process_inputs", _resolve_depth)
    _replace(AsyncLLM, "generate", _refuse_early)
    _replace(OpenAIServingResponses, "_generate_with_builtin_tools", _refuse_responses_early)
    _replace(OpenAIServingResponses, "retrieve_responses", _refuse_late_streams)
    _replace(OpenAIServingModels, "load_lora_adapter", _blame_adapters)
    _replace(AnthropicServingMessages, "create_messages", _answer_refusals)
    _replace(error_response, "sanitize_message", _cut_message)
    _replace(ChatCompletionRequest, "build_chat_params", _read_gateway_effort)
    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _replace(request, "to_sampling_params", _forward_effort)
    _replace(OutputProcessor, "add_request", _count_accepted)
    _replace(OutputProcessor, "process_outputs", _record_loops)
    _replace(RequestState, "_new_completion_output", usage.wrap_completion)
    _replace(OpenAIServingChat, "chat_completion_full_generator", usage.wrap_response)
    _replace(OpenAIServingChat, versions.chat_stream(OpenAIServingChat), usage.wrap_stream(results_at=1))
    _replace(OpenAIServingChatBatch, "chat_completion_full_generator_batch", usage.wrap_batch)
    _replace(AnthropicServingMessages, "messages_full_converter", usage.wrap_message)
    _replace(AnthropicServingMessages, "message_stream_converter", usage.wrap_message_stream)
    _replace(OpenAIServingCompletion, "request_output_to_completion_response", usage.wrap_completions)
    _replace(OpenAIServingCompletion, "completion_stream_generator", usage.wrap_stream(results_at=2))
    _replace(OpenAIServingResponses, "responses_full_generator", usage.wrap_responses)
    _replace(ServingTokens, "serve_tokens_full_generator", usage.wrap_response)
    _replace(ServingTokens, "serve_tokens_stream_generator", usage.wrap_stream(results_at=1))
    _replace(BeamSearchOnlineMixin, "beam_search", _refuse_beam_search)
    _replace(BeamSearchOfflineMixin, "beam_search", _refuse_beam_search)


def serve_as_published() -> None:
    """Make answers end where a checkpoint's chat template ends them, and let an effort leave the prompt as it is.

    For MELTs and LoopLMs: Ouro's files state an end mark that its chats do not use.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    _replace(ModelConfig, "try_get_generation_config", _add_end_marks)
    for request in (ChatCompletionRequest, ResponsesRequest):
        _replace(request, "build_chat_params", _keep_thinking_as_it_is)


def _add_end_marks(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def try_get_generation_config(self: ModelConfig) -> dict[str, Any]:
        fields = original(self)
        if not isinstance(self.hf_config, LoopLMConfig) or self.skip_tokenizer_init:
            return fields
        if "eos_token_id" in self.override_generation_config:  # vLLM takes sampling parameters from there, and no marks
            return {**fields, "eos_token_id": self.override_generation_config["eos_token_id"]}
        stated = fields.get("eos_token_id", [])
        marks = [stated] if isinstance(stated, int) else list(stated)
        marks += [mark for mark in end_marks(cached_tokenizer_from_config(self)) if mark not in marks]
        return {**fields, "eos_token_id": marks}

    return try_get_generation_config


def _keep_thinking_as_it_is(original: Callable[..., Any]) -> Callable[..., Any]:
    # vLLM takes any effort but `none` for the wish to think, and templates then open a <think>. Here it is loops.
    @functools.wraps(original)
    def build_chat_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        if "enable_thinking" not in (self.chat_template_kwargs or {}) and params.chat_template_kwargs.get(
            "enable_thinking"
        ):
            params.chat_template_kwargs.pop("enable_thinking")
        return params

    return build_chat_params


def stop_quietly() -> None:
    """Let `AsyncLLM` remember that it was told to stop, and not take the end of its engine for an error then.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    _replace(AsyncLLM, "shutdown", _stop_quietly)


def is_stopping(engine: Any) -> bool:
    """Return whether vLLM's `AsyncLLM` has been told to stop."""
    return getattr(engine, "melt_stopping", False)


def _stop_quietly(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        resources = getattr(getattr(self, "engine_core", None), "resources", None)  # it may not have come to these
        manager = getattr(resources, "engine_manager", None)
        if manager is not None and not is_stopping(self):
            manager.shutdown = functools.partial(_end_engine, self, manager.shutdown)
        self.melt_stopping = True
        until = time.monotonic() + (timeout or 0) - 1
        # One of several API servers has no engine to wait for; their parent gives each this long.
        if manager is None and hasattr(self, "output_processor"):
            while self.get_num_unfinished_requests() and time.monotonic() < until:
                time.sleep(0.1)
            _stop_reading(self)
        original(self, timeout)

    return shutdown


def _end_engine(engine: Any, end: Callable[..., None], timeout: float | None = None) -> None:
    # The engine's process ends when its requests have, or is killed at its time. What reads its answers must not take
    # either for an error: requests that are cut then would be told of a broken engine, not of a server that stops.
    # (vLLM also calls this without a timeout, when the process has ended: its last answers may still be on their way.)
    late = threading.Timer(max(0.0, (timeout or 0) - 0.2), _stop_reading, [engine])
    late.daemon = True
    if timeout is not None:
        late.start()
    end(timeout=timeout)
    late.cancel()
    if not engine.get_num_unfinished_requests():
        _stop_reading(engine)


def _stop_reading(engine: Any) -> None:
    # vLLM does this last; closing its sockets before that is an error for whoever reads them.
    if (handler := getattr(engine, "output_handler", None)) is not None:
        cancel_task_threadsafe(handler)


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


def start_beside_numba() -> None:
    """Let an engine start on a CPU in a process that has loaded numba, as drafts by n-grams do.

    Where Triton is missing, vLLM looks through all modules for its kernels. It takes what llvmlite's handle of its
    library answers to every name for a dictionary, and ends in an AttributeError.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher

    def without_llvmlite(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def rebind_kernels(*args: Any) -> None:
            hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite.")}
            try:
                original(*args)
            finally:
                sys.modules.update(hidden)

        return rebind_kernels

    if current_platform.is_cpu():
        _replace(dispatcher, "_rebind_kernels", without_llvmlite)


def rank_without_a_compiler() -> None:
    """Let an engine on a CPU count how many tokens are likelier than a token as it is written, not compiled.

    vLLM has that compiled at the first request for log probabilities: seconds in which all others wait, and the end of
    the engine where there is no C++ compiler.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.sample import sampler

    _replace(sampler, "batched_count_greater_than", inspect.unwrap)


def sample_drafts_at_their_temperatures() -> None:
    """Let an engine on a CPU verify drafts at the temperature, top-k and top-p of their requests.

    vLLM 0.32 gives its kernel a copy to write them to where they are no 64-bit integers, and goes on with what was
    never written: where one request samples, answers come from random memory. Only all-greedy steps are spared.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.sample import rejection_sampler

    _replace(rejection_sampler, "expand_batch_to_tokens", _expand_by_torch)


def _expand_by_torch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def expand(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    return expand


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
        if name is None:
            lifeline.own(self.shared_memory)

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

        return capture

    _replace(ModelCudaGraphManager, "capture", unless_melt)


def forget_measured_graphs(model_state: type[Any]) -> None:
    """Drop graphs of loops that vLLM captured only to measure their memory, before it makes room for the KV cache.

    It drops its own there, and has no hook for those of a model. For the processes that run the model.

    Args:
        model_state: the class of the models that this concerns; its `graphs` are dropped.

    Raises:
        RuntimeError: vLLM does not have what is to be patched.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def forgetting(original: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(original)
        def capture_model(self: Any, *args: Any, **kwargs: Any) -> int:
            size = original(self, *args, **kwargs)
            if kwargs.get("profile_only") and isinstance(self.model_state, model_state):
                self.model_state.graphs.clear()
            return size

        return capture_model

    _replace(GPUModelRunner, "capture_model", forgetting)


def report_loops_run(model_state: type[Any]) -> None:
    """Let vLLM's GPU runner state, with each step's output, the loops that ran for every sampled token.

    It has no hook between a step and its output. The numbers are the host's, or come to the host before the step's
    tokens do, and ride on the output of their own step: the next one may be under way before it is read. For the
    processes that run the model.

    Args:
        model_state: the class of the models that this concerns; its `token_loops` and `exit_probabilities` are of the
            step that ran last.

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
                output.model_runner_output.exit_probabilities = self.model_state.exit_probabilities()
            return output

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
        if isinstance(model_config.hf_config, LoopLMConfig):
            request.sampling_params = _resolved(request.sampling_params, self.vllm_config)
        return original(self, request)

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

    return from_layer


def _replace(owner: type | ModuleType, name: str, wrap: Callable[[Any], Any]) -> None:
    original = owner.__dict__.get(name)
    if original is None:
        raise RuntimeError(f"melt-serve cannot patch {owner.__name__}.{name}: this vLLM does not have it")
    done = getattr(original, "melt_serve", ())
    if (patch := wrap.__qualname__) not in done:
        replacement = wrap(original)
        replacement.melt_serve = (*done, patch)
        setattr(owner, name, replacement)


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

    return set_defaults


LOOPS_OF_DRAFTS_REFUSED = (
    "return_loops does not tell tokens that were drafted: this server has a --speculative-config; ask without it"
)
RESUMABLE_REFUSED = (
    "a looped model cannot resume a session with streamed inputs: in token mode its prompt would be cut elsewhere, "
    "in chunk mode and of a LoopLM it is not proved; send the whole prompt as one request"
)


def _resolve_depth(original: Callable[..., Any]) -> Callable[..., Any]:
    # Every request passes here, however vLLM is run, and a VLLMValidationError raised here becomes a 400. Of what else
    # vLLM's checks raise (a grammar that recurses, a number that does not fit), AsyncLLM makes a 500 without a message.
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
        if isinstance(self.model_config.hf_config, LoopLMConfig):
            if resumable:  # its next input would continue a prompt inside a chunk whose rows are final already
                raise VLLMValidationError(RESUMABLE_REFUSED)
            params = _resolved(params, self.vllm_config)
        try:
            return original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)
        except VLLMError:
            raise
        except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
            raise VLLMValidationError(f"vLLM does not take this request: {error or type(error).__name__}") from error

    return process_inputs


def _resolved(params: SamplingParams, vllm_config: VllmConfig) -> SamplingParams:
    resolved = resolve_depth(params, vllm_config.model_config.hf_config)
    if vllm_config.speculative_config is not None and asked_of(resolved).returns_loops:
        raise VLLMValidationError(LOOPS_OF_DRAFTS_REFUSED, parameter=RETURN_LOOPS)
    return resolved


def _refuse_early(original: Callable[..., AsyncGenerator]) -> Callable[..., AsyncGenerator]:
    # An asynchronous generator runs when it is iterated: a stream's 200 has then gone out, and what is wrong with the
    # request can only be told in an event. So the request is checked when the generator is made, and again as before.
    @functools.wraps(original)
    def generate(
        self: Any, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator:
        _check(self, prompt, sampling_params, request_id, **kwargs)
        return original(self, prompt, sampling_params, request_id, **kwargs)

    return generate


def _refuse_responses_early(original: Callable[..., AsyncGenerator]) -> Callable[..., AsyncGenerator]:
    # The same: the Responses API calls AsyncLLM.generate in a generator of its own.
    @functools.wraps(original)
    def generate_with_tools(
        self: Any, request_id: str, engine_input: Any, sampling_params: SamplingParams, **kwargs: Any
    ) -> AsyncGenerator:
        _check(self.engine_client, engine_input, sampling_params, request_id, **kwargs)
        return original(self, request_id, engine_input, sampling_params, **kwargs)

    return generate_with_tools


def _refuse_late_streams(original: Callable[..., Any]) -> Callable[..., Any]:
    # The same: what cannot be streamed from a stored answer vLLM finds when the stream has begun.
    @functools.wraps(original)
    async def retrieve_responses(self: Any, response_id: str, starting_after: int | None, stream: bool | None) -> Any:
        wrong = None
        if stream and response_id in self.response_store and response_id not in self.event_store:
            wrong = "stream", "only an answer that was asked for with background and stream can be streamed later"
        elif stream and starting_after is not None and starting_after < 0:
            wrong = "starting_after", f"events are counted from 0, not {starting_after}"
        if wrong is not None:
            return self.create_error_response(message=wrong[1], param=wrong[0])
        return await original(self, response_id, starting_after, stream)

    return retrieve_responses


def _blame_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    # What is wrong with an adapter's files a worker finds, and vLLM calls that an error of the server's.
    @functools.wraps(original)
    async def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await original(self, *args, **kwargs)
        if isinstance(answer, ErrorResponse) and answer.error.code >= 500 and not self.engine_client.errored:
            answer.error.code, answer.error.type = HTTPStatus.BAD_REQUEST, "BadRequestError"
        return answer

    return load_lora_adapter


def _check(engine: Any, prompt: Any, params: SamplingParams, request_id: str, **kwargs: Any) -> None:
    """Raise what vLLM's input processor says of a request, if its prompt is tokens already."""
    if isinstance(prompt, Mapping) and "type" in prompt:
        known = {name: kwargs[name] for name in ("lora_request", "data_parallel_rank") if name in kwargs}
        engine.input_processor.process_inputs(request_id, prompt, params, ("generate",), **known)


def _answer_refusals(original: Callable[..., Any]) -> Callable[..., Any]:
    # What this raises vLLM answers as it should, but with a traceback in the log for every mistake of a client.
    @functools.wraps(original)
    async def create_messages(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, *args, **kwargs)
        except (VLLMClientError, TypeError, ValueError) as error:
            return error_response.create_error_response(error)

    return create_messages


LONGEST_MESSAGE = 1000
"""Characters of an error's message: vLLM repeats the value that it refuses, which may be megabytes."""


def _cut_message(original: Callable[[str], str]) -> Callable[[str], str]:
    @functools.wraps(original)
    def sanitize(message: str) -> str:
        return original(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")

    return sanitize


def _count_accepted(original: Callable[..., None]) -> Callable[..., None]:
    # A request that was refused does not come here. Of n answers to a prompt, the first one counts.
    @functools.wraps(original)
    def add_request(
        self: OutputProcessor, request: Any, prompt: Any, parent: Any = None, index: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        original(self, request, prompt, parent, index, *args, **kwargs)
        if index == 0:
            usage.count_accepted(request.sampling_params)

    return add_request


def _record_loops(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(self: OutputProcessor, outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        runs = usage.take_runs(outputs, self.request_states)
        processed = original(self, outputs, *args, **kwargs)
        ended = {output.request_id for output in outputs if output.finished}.union(processed.reqs_to_abort)
        usage.observe(runs[request_id] for request_id in runs.keys() & ended)  # aborted here: by a stop string
        return processed

    return process_outputs


def _forward_effort(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    # vLLM gives OpenAI's reasoning_effort to the chat template only, and to nobody where there is none.
    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = original(self, *args, **kwargs)
        effort = _effort_of(self)
        if effort is not None:
            params.extra_args = {**(params.extra_args or {}), EFFORT: effort}
        return params

    return to_sampling_params


def _read_gateway_effort(original: Callable[..., Any]) -> Callable[..., Any]:
    # The chat template asks for the effort, too: none switches reasoning off.
    @functools.wraps(original)
    def build_chat_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.reasoning_effort = _effort_of(self)
        return original(self, *args, **kwargs)

    return build_chat_params


def _effort_of(request: Any) -> Any:
    """Return the effort that a request asks for, not validated, or None.

    Beside OpenAI's `reasoning_effort` there is `reasoning`: an object of the Responses API, and of gateways, which send
    it on every route, also as a bare word or with nothing but `{"enabled": false}`.
    """
    effort = getattr(request, EFFORT, None)
    reasoning = getattr(request, "reasoning", None)
    if effort is not None or reasoning is None:
        return effort
    if isinstance(reasoning, str):
        return reasoning
    if isinstance(reasoning, Mapping):
        return "none" if reasoning.get("enabled") is False else reasoning.get("effort")
    return getattr(reasoning, "effort", None)


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

    return beam_search
