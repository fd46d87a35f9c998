"""What comes out of training: checkpoint folders that transformers and vLLM take as they are, with cards."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import fill

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from melt_serve.answers import note_end_marks
from melt_serve.checkpoint_files import copy_the_rest, licence_of
from melt_serve.checkpoint_path import shown_name
from melt_serve.checksums import write_sums
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.task.evaluate import Score
from melt_serve.train.atomic import replacing
from melt_serve.train.loop.logs import minutes_trained, parts_of
from melt_serve.train.recipe import PostTraining, Recipe
from melt_serve.train.stages import Stage

WIDTH = 100


def export(
    model: OuroForCausalLM | MeltForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    card: str,
    target: Path,
    source: Path | None = None,
) -> None:
    """Write weights, config, tokenizer, chat template, card and checksums; `target` is replaced whole or not at all.

    Args:
        source: a checkpoint whose own tokenizer files, generation defaults and licence are carried over.

    Raises:
        OSError: the disk is full, or fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        with replacing(target) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            if source is not None:
                copy_the_rest(source, part)
            note_end_marks(part, tokenizer)
            (part / "README.md").write_text(card, encoding="utf-8")
            for weights in part.glob("*.safetensors"):  # which safetensors keeps from all other users
                shutil.copymode(part / "README.md", weights)
            write_sums(part)
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error


def teacher_card(model: OuroForCausalLM, recipe: Recipe, minutes: float, scores: Sequence[Score]) -> str:
    """Write the model card of the bundled LoopLM."""
    what = (
        f"A looped language model (LoopLM, as Ouro, arXiv 2510.25741) of {describe(model)}. It is the teacher that "
        "`melt-demo` was distilled from, and bundled to compare with: its KV cache grows with the loops."
    )
    how = (
        "Cross-entropy on the replies, mean over loops; a loop is asked for as many steps of a chain as it can have "
        "made. `shallow` is the same model with one loop on the same data."
    )
    return card("looplm-demo", what, how, ("teacher", "shallow"), recipe, minutes, scores)


def student_card(model: MeltForCausalLM, recipe: Recipe, minutes: float, scores: Sequence[Score]) -> str:
    """Write the model card of the bundled MELT."""
    what = (
        f"A Memory-Efficient Looped Transformer (MELT, arXiv 2605.07721) of {describe(model)}, chunks of "
        f"{model.config.chunk_size} tokens, `{model.config.decode_mode}` decode mode. Its KV cache does "
        "not grow with the loops."
    )
    how = (
        "Post-trained from `looplm-demo` by the paper's two phases, interpolated transition and attention-aligned "
        "distillation, at depths drawn anew for every batch; then tokens learnt to leave their loops early."
    )
    return card("melt-demo", what, how, ("transition", "alignment", "exits"), recipe, minutes, scores)


def card(
    name: str, what: str, how: str, stages: Sequence[str], recipe: Recipe, minutes: float, scores: Sequence[Score]
) -> str:
    """Write a bundled checkpoint's model card: what it is, how it was made, and what it answers."""
    task = (
        "It answers one kind of question, made up endlessly by `melt_serve.task.who_is_where`: who is where, when most "
        f"people are said to be with somebody else. It knows nothing else. Seed {recipe.seed}; all stages together "
        f"took {minutes:.0f} minutes with {torch.get_num_threads()} CPU threads. Remake it with"
    )
    from_nothing = any(score.checkpoint == "shallow" for score in scores)
    shallow = "`shallow` the same model with one loop on the same data, " * from_nothing
    names = (
        f"`looplm-demo` is the teacher, {shallow}`converted` the teacher with shared rows (gate type `last`) and no "
        f"post-training. Greedy, whole answers right, of {scores[0].questions:,}; reference model, float32."
    )
    made = {stage: getattr(recipe, stage) for stage in stages}
    parts = [
        f"---\nlicense: apache-2.0\nlibrary_name: melt_serve\n---\n\n# {name}",
        fill(what, WIDTH),
        fill(task, WIDTH),
        "    python -m melt_serve.train bundled" + " --teacher melt_serve/checkpoints/looplm-demo" * (not from_nothing),
        "## Recipe",
        fill(how, WIDTH),
        stage_table(made),
        "## Held-out questions",
        fill(names, WIDTH),
        score_table(scores),
    ]
    return "\n\n".join(parts) + "\n"


def run_card(model: MeltForCausalLM, recipe: PostTraining, teacher: Path, log: list[dict], said: str = "") -> str:
    """Write the model card of a MELT made from a LoopLM of the user's own.

    Args:
        teacher: the folder of what the recipe names.
        log: the steps, as they were logged.
        said: what it says besides, of a run that is not done.
    """
    config = model.config
    rank = f", its gate cut to rank {config.kv_gate_rank}" if config.kv_gate_rank else ""
    what = (
        f"A Memory-Efficient Looped Transformer (MELT, arXiv 2605.07721) of {describe(model)}, chunks of "
        f"{config.chunk_size} tokens, `{config.decode_mode}` decode mode, at most {config.max_loops} loops{rank}. Its "
        f"KV cache does not grow with the loops. Made by `melt_serve` from the LoopLM `{shown_name(recipe.teacher)}`"
        + (f", beginning with the MELT `{shown_name(recipe.student)}`. " if recipe.student else ". ")
        + said
    )
    bases = {
        "full": "",
        "frozen": " Only the gates were trained: the base is the teacher's.",
        "lora": f" Beside the gates, adapters of rank {recipe.lora_rank} of q, k, v and o were trained, and merged.",
    }
    how = (
        f"Post-trained on {', '.join(f'`{Path(file).name}`' for file in recipe.data.files)} in sequences of at most "
        f"{recipe.sequence_length:,} tokens, {recipe.batch_tokens:,} tokens a step, in {recipe.dtype}, seed "
        f"{recipe.seed}.{bases[recipe.train_base]} All steps together took {minutes_trained(log):,.1f} minutes. "
        "Nothing but the losses below was measured: evaluate it before you rely on it."
    )
    parts = [
        f"---\n{licence_of(teacher)}library_name: melt_serve\n---\n\n# {Path(recipe.output).name}",
        fill(what, WIDTH),
        "## Recipe",
        fill(how, WIDTH),
        stage_table(recipe.stages),
        "## Losses",
        fill("Means of the first and the last tenth of each stage's steps.", WIDTH),
        loss_table(log),
    ]
    return "\n\n".join(parts) + "\n"


def loss_table(log: list[dict]) -> str:
    """Format how far every part of the loss came in every stage."""
    lines = ["| stage | part | first | last |", "|---" * 4 + "|"]
    for stage in dict.fromkeys(entry["stage"] for entry in log):
        steps = [entry for entry in log if entry["stage"] == stage]
        for part in parts_of(steps):
            values = [entry[part] for entry in steps if part in entry]
            tenth = max(1, len(values) // 10)
            first, last = (sum(some) / tenth for some in (values[:tenth], values[-tenth:]))
            lines.append(f"| {stage} | {part.replace('_', ' ')} | {first:.4g} | {last:.4g} |")
    return "\n".join(lines)


def describe(model: OuroForCausalLM | MeltForCausalLM) -> str:
    """Describe weights and shape in words."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    plural = "s" * (config.num_hidden_layers > 1)
    return (
        f"{weights:,} weights: {config.num_hidden_layers} layer{plural} of width {config.hidden_size} run "
        f"{config.total_ut_steps} times"
    )


def stage_table(stages: Mapping[str, Stage]) -> str:
    """Format every field of these stages."""
    lines = [f"| | {' | '.join(f'`{name}`' for name in stages)} |", "|---" * (len(stages) + 1) + "|"]
    lines += [
        f"| {field.name} | {' | '.join(str(getattr(stage, field.name)) for stage in stages.values())} |"
        for field in fields(next(iter(stages.values())))
    ]
    return "\n".join(lines)


def score_table(scores: Sequence[Score]) -> str:
    """Format the scores as Markdown."""
    lines = ["| checkpoint | loops | decode mode | exit threshold | mean loops | right |", "|---" * 6 + "|"]
    lines += [
        f"| {each.checkpoint} | {each.loops} | {each.decode_mode or '-'} | {each.exit_threshold or '-'} | "
        f"{each.mean_loops:.2f} | {each.accuracy:.1%} |"
        for each in scores
    ]
    return "\n".join(lines)
