"""Which vLLM is taken, and that what we lean on in it is looked for where another version would lack it."""

import asyncio

import pytest
from vllm.entrypoints.generate.base.protocol import UsageInfo
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
from vllm.v1.engine.async_llm import AsyncLLM

from melt_serve.engine import usage, versions
from tests.engine import vllm_names


def test_a_version_that_was_only_read_starts_with_a_warning_and_one_that_is_not_known_does_not(monkeypatch):
    said = []
    monkeypatch.setattr(versions.logger, "warning", lambda *words: said.append(words[0] % words[1:]))
    versions.check("0.32.1+cpu")
    versions.check("0.33.0", warn=False)  # a worker
    assert not said
    versions.check("0.33.0")
    assert len(said) == 1 and "vLLM 0.33.0, but has never run on it" in said[0] and "\n" not in said[0]
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.32\.x, but vLLM 0\.34\.0 is installed: install"):
        versions.check("0.34.0")


def test_all_that_is_patched_is_in_the_installed_vllm():
    assert len(vllm_names.patched()) > 30
    assert vllm_names.missing(vllm_names.installed()) == []


def test_what_another_vllm_has_renamed_is_named(tmp_path):
    name = "vllm.v1.engine.async_llm"
    source = vllm_names.file_of(vllm_names.installed(), name).read_text()
    path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(source.replace("def shutdown(", "def stop("))
    missing = vllm_names.missing(tmp_path)
    assert f"{name}.{AsyncLLM.__name__}.shutdown is patched, and gone" in missing
    assert f"{name}.{AsyncLLM.__name__}.generate is patched, and gone" not in missing


def test_overridden_methods_are_found_in_the_classes_that_define_them():
    overridden = set(vllm_names.overridden(vllm_names.installed()))
    scheduler = ("vllm.v1.core.sched.scheduler", "Scheduler")
    assert {(*scheduler, "_get_local_prefix_cache_hit"), (*scheduler, "_handle_blocked_waiting_request")} <= overridden
    assert ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "prepare_inputs") in overridden


def test_streams_of_chunks_tell_their_loops_as_streams_of_events_do():
    """What 0.33 makes Anthropic's streams from: chunks, of which the last one has the usage."""
    plain = ChatCompletionStreamResponse(model="melt", choices=[])
    last = ChatCompletionStreamResponse(model="melt", choices=[], usage=UsageInfo())
    loops = {"mean": 2.0, "max": 2}
    assert "loops" not in usage.add_to_event(plain, loops).model_dump_json()
    assert '"loops":{"mean":2.0,"max":2}' in usage.add_to_event(last, loops).model_dump_json(exclude_unset=True)

    async def events(_self, chunks):
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json(include={'usage'})}\n\n"

    async def converted():
        async def chunks():
            yield plain
            yield last

        return [event async for event in usage.wrap_message_stream(events)(None, chunks())]

    assert '"loops":{"mean":2.0,"max":2}' in asyncio.run(converted())[-1]
