"""`--reasoning-parser loops`: reasoning and answer, split where `<think>` and `</think>` are.

vLLM's `qwen3` takes an answer without tags for reasoning, and leaves tags in the content where the effort is `none`.
Ouro's checkpoints answer with and without tags, and some chat templates open the tag in the prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.parser.engine.events import SemanticEvent
from vllm.parser.engine.parser_engine_config import ParserState, Transition
from vllm.parser.qwen3 import CHATML_TURN_BOUNDARIES, Qwen3Parser, qwen3_config

from melt_serve.answers import END_THINK, THINK, opens_thinking

NAME = "loops"
"""As `plugin.py` registers it."""


class LoopedParser(Qwen3Parser):
    """Qwen3's tags, in an answer that is content until one is opened: by the answer itself, or by its prompt."""

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        config = qwen3_config(thinking=False, name=NAME, turn_boundary_tokens=CHATML_TURN_BOUNDARIES)
        opening = {(ParserState.CONTENT, "THINK_START"): Transition(ParserState.REASONING)}
        kwargs["parser_engine_config"] = replace(
            config, transitions={**config.transitions, **opening}, wait_for_reasoning=True
        )
        self.opened = opens_thinking(tokenizer, **(kwargs.get("chat_template_kwargs") or {}))
        super().__init__(tokenizer, tools, **kwargs)
        self.thinking_enabled = True  # tags are split whatever `enable_thinking` says

    def _reset(self, initial_state: ParserState | None = None) -> None:
        if initial_state is None and self.opened:
            initial_state = ParserState.REASONING
        super()._reset(initial_state)

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Begin inside reasoning if the prompt's last turn opens it and does not close it."""
        last = next(
            (
                each
                for each in reversed(prompt_token_ids)
                if each in self._tags or each in self._turn_boundary_token_ids
            ),
            None,
        )
        self.opened = last == self._reasoning_start_token_id
        self._streaming_initialized = False
        self.initialize_streaming()

    @property
    def _tags(self) -> set[int | None]:
        return {self._reasoning_start_token_id, self._reasoning_end_token_id}

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Split a whole answer; one that closes a tag that it has not opened was opened by its prompt."""
        self.opened |= END_THINK in model_output and THINK not in model_output
        return super().extract_reasoning(model_output, request)

    def _events_to_delta(self, events: list[SemanticEvent], finished: bool = False) -> DeltaMessage | None:
        # Once an answer has begun there is no more reasoning: what follows may be a tool call, for another parser.
        delta = super()._events_to_delta(events, finished)
        if delta is not None and delta.content:
            self._reasoning_ended = True
        return delta


class LoopedReasoning(ParserEngineReasoningAdapter):
    """The parser as vLLM's serving code takes it."""

    _parser_engine_cls = LoopedParser
