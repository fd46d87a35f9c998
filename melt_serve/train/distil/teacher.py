"""The frozen LoopLM: how it is loaded, and what it says about a batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from melt_serve.checkpoint_check import read_looplm
from melt_serve.checkpoint_files import verify_values
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.config import LoopLMConfig
from melt_serve.modeling import OuroForCausalLM
from melt_serve.train.data.batch import Batch
from melt_serve.train.recipe import PostTraining
from melt_serve.train.session import TrainingError
from melt_serve.train.stages import Distillation


def load_teacher(recipe: PostTraining, path: Path) -> tuple[OuroForCausalLM, PreTrainedTokenizerFast]:
    """Load the frozen LoopLM in float32, and its tokenizer.

    Args:
        path: the folder of what the recipe names.

    Raises:
        CheckpointError: the folder holds no whole LoopLM, by the rules of `convert`.
        TrainingError: the recipe does not fit it.
    """
    try:
        _, config, shards = read_looplm(path)
        tokenizer = tokenizer_of(path, config.vocab_size)
        with tqdm(disable=True) as bar:
            for shard in shards:
                verify_values(shard, bar)
    except CheckpointError as error:
        raise CheckpointError(f"teacher={recipe.teacher} cannot be post-trained: {error}") from error
    for name in ("trained_rank", "gate_rank", "lora_rank"):
        if (getattr(recipe, name) or 0) > config.hidden_size:
            rank, width = getattr(recipe, name), config.hidden_size
            raise TrainingError(f"{name}={rank} is more than the teacher's hidden_size={width}")
    if recipe.sequence_length > config.max_position_embeddings:
        raise TrainingError(
            f"sequence_length={recipe.sequence_length} is more than the teacher's "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    check_loops(config, recipe.stages)
    teacher = OuroForCausalLM.from_pretrained(path, dtype=torch.float32)
    return teacher.eval().requires_grad_(False), tokenizer


def tokenizer_of(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none that can be read, or it has ids that the model has no row for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers has errors of no other class
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} has no tokenizer that can be read ({reason}); put the tokenizer's files there"
        ) from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has the id {highest}, which is outside the vocabulary that config.json states, "
            f"0..{vocabulary - 1}; the two must come from the same checkpoint"
        )
    return tokenizer


def check_loops(teacher: LoopLMConfig, stages: Mapping[str, Distillation]) -> None:
    """See that the teacher may be asked for as many loops as the stages run.

    Raises:
        TrainingError: its config states fewer.
    """
    for name, stage in stages.items():
        if teacher.max_loops is not None and max(stage.loops) > teacher.max_loops:
            raise TrainingError(
                f"{name}.loops={list(stage.loops)} is more than the teacher's max_loops={teacher.max_loops}; name "
                "fewer, or raise it in the teacher's config.json"
            )


@dataclass(frozen=True)
class Answers:
    """What a looped model, teacher or student, says about a batch.

    Attributes:
        states: [T, tokens, d], after every loop, of the tokens asked for.
        head: [V, d], the vocabulary head's weight.
        attention: teacher only: o of every loop and layer, T times N of [B, S, d].
        distance: student only: the sum over loops, layers and tokens of the attention outputs' squared distance.
        loops_run: the loops that a student's tokens, where they leave, are expected to run, summed over tokens.
    """

    states: Tensor
    head: Tensor
    attention: list[Tensor] | None = None
    distance: Tensor | None = None
    loops_run: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The logits of all loops and tokens at once, [T, tokens, V]."""
        return F.linear(self.states, self.head)


@torch.no_grad()
def ask_teacher(teacher: OuroForCausalLM, batch: Batch, tokens: Tensor, loops: int, attention: bool) -> Answers:
    """Run the frozen LoopLM on a batch, and keep its attention outputs where they are asked for.

    Args:
        tokens: [B, S], true where an answer is wanted.
    """
    with attention_outputs(teacher) as outputs:
        answered = teacher(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            document_starts=batch.document_starts,
            loops=loops,
            exit_threshold=1.0,
            output_states=True,
        )
    states, head = answered.loop_states[:, tokens], teacher.lm_head.weight
    return Answers(states, head, attention=outputs if attention else None)


@contextmanager
def attention_outputs(model: OuroForCausalLM) -> Iterator[list[Tensor]]:
    """Collect o = W_O attn(...) of every loop and layer, in the order they are computed."""
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda module, arguments, o: outputs.append(o))
        for layer in model.model.layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
