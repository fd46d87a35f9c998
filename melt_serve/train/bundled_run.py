"""The bundled checkpoints from nothing: a LoopLM is trained, then turned into the MELT that is served.

Five stages, each resumable: the teacher; the same model with one loop, to see what depth is worth; phase 1,
interpolated transition; phase 2, attention-aligned distillation; the exit gate. Then a table of held-out questions.
"""

from pathlib import Path

import torch
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedTokenizerFast

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.checkpoint_config import located_looped
from melt_serve.config import DECODE_MODES, LoopLMConfig
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.task.evaluate import Score, score
from melt_serve.task.tokenizer import MAX_TOKENS, VOCABULARY, build_tokenizer
from melt_serve.task.who_is_where import KINDS
from melt_serve.train.data.batch import Batch
from melt_serve.train.data.task_batches import training_batch
from melt_serve.train.distil.build import fresh_config, plain, student_of
from melt_serve.train.distil.losses import cross_entropy_over_loops
from melt_serve.train.distil.phase import loops_of, run_phase
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import check_loops
from melt_serve.train.inputs import note_inputs, teacher_files
from melt_serve.train.loop.export import export, student_card, teacher_card
from melt_serve.train.loop.logs import LOG, minutes_trained, read_log
from melt_serve.train.loop.trainer import Losses, Run, run_stage
from melt_serve.train.recipe import Recipe
from melt_serve.train.session import Session
from melt_serve.train.stages import Distillation, Pretraining

EXIT_BIAS = -3.0
"""The exit gate's bias before it is trained: a token leaves after a loop with a probability of about one in twenty."""
EXIT_THRESHOLDS = (0.9, 0.5)
"""Measured at the usual depth."""
EFFORTS = {"none": 2, "minimal": 2}
"""Loops of the least efforts: after one loop the model repeats a name and never ends."""


def make_checkpoints(
    recipe: Recipe, folder: Path, target: Path, session: Session, count: int, kept: str | None = None
) -> list[Score]:
    """Run all stages, measure on `count` held-out questions, and write both checkpoints with their cards.

    Args:
        folder: holds states and logs; what an earlier session left there is gone on with.
        target: `looplm-demo` and `melt-demo` in it are replaced when everything is done, and not before.
        kept: a LoopLM of the task to post-train, a folder or a name on the hub, instead of one from nothing; only
            `melt-demo` is written then.

    Raises:
        CheckpointError: `kept` is not there.
        TrainingError: `folder` holds a run with another teacher; see also `run_stage`.
        Paused: see `run_stage`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = None if kept is None else located_looped(kept)
    note_inputs({} if kept is None or there is None else teacher_files(kept, there), {}, folder)
    tokenizer, run = build_tokenizer(), Run(folder, session)
    shallow = None
    if there is None:
        teacher = pretrain("teacher", recipe, recipe.teacher, tokenizer, run)
        shallow = pretrain("shallow", recipe, recipe.shallow, tokenizer, run)
    else:
        teacher = OuroForCausalLM.from_pretrained(there, dtype=torch.float32).eval().requires_grad_(False)
    phases = {"transition": recipe.transition, "alignment": recipe.alignment, "exits": recipe.exits}
    check_loops(teacher.config, phases)
    student = fresh_student(teacher, recipe)
    for name, stage in phases.items():
        distil(name, stage, teacher, student, tokenizer, run)
    melt = plain(student)
    melt.config.effort_loops = EFFORTS
    scores = measure(teacher, shallow, melt, recipe, count)
    minutes = minutes_trained(read_log(folder / LOG))
    target.mkdir(parents=True, exist_ok=True)
    if kept is None:
        export(teacher, tokenizer, teacher_card(teacher, recipe, minutes, scores), target / LOOPLM.name)
    export(melt, tokenizer, student_card(melt, recipe, minutes, scores), target / MELT.name)
    return scores


def pretrain(
    name: str,
    recipe: Recipe,
    stage: Pretraining,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
) -> OuroForCausalLM:
    """Train a LoopLM from nothing: cross-entropy on the replies, at every loop."""
    model = fresh_looplm(recipe, stage, tokenizer)

    def losses(step: int) -> Losses:
        aloud = step < stage.aloud_until * stage.steps
        batch = training_batch(tokenizer, stage.batch, stage.seed, step, ("aloud",) if aloud else KINDS)
        loops = loops_of(stage, step)
        output = model(batch.input_ids, attention_mask=batch.attention_mask, loops=loops, output_loops=True)
        answered = output.loop_logits[:, batch.before_reply]
        return {"loss": cross_entropy_over_loops(answered, batch.reply_by_loop(loops))}

    inside = {id(weight) for layer in model.model.layers for weight in layer.parameters() if weight.ndim == 2}
    matrices = [weight for weight in model.parameters() if id(weight) in inside]
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    optimizers: list[Optimizer] = [
        Muon(matrices, lr=stage.matrix_learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay),
    ]
    run_stage(name, stage, model, optimizers, losses, run)
    return model.eval().requires_grad_(False)


def distil(
    name: str,
    stage: Distillation,
    teacher: OuroForCausalLM,
    student: Student,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
) -> None:
    """Run one phase of post-training on the task's questions."""

    def batches(step: int) -> list[Batch]:
        return [training_batch(tokenizer, stage.batch, stage.seed, step)]

    run_phase(name, stage, teacher, student, batches, run)


def fresh_looplm(recipe: Recipe, stage: Pretraining, tokenizer: PreTrainedTokenizerFast) -> OuroForCausalLM:
    """Build a LoopLM before its first step; by default it runs the recipe's loops, or its deepest stage's if fewer."""
    shape = recipe.shape
    config = LoopLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        total_ut_steps=min(recipe.shape.loops, max(stage.loops)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = OuroForCausalLM(config).train()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=stage.embedding_std)
        model.lm_head.weight.copy_(0.1 * model.model.embed_tokens.weight)
        model.model.early_exit_gate.bias.fill_(EXIT_BIAS)
    return model


def fresh_student(teacher: OuroForCausalLM, recipe: Recipe, **gate: str) -> Student:
    """Build a MELT of the teacher's weights with a fresh gate; `gate` are its fields."""
    shape, start = recipe.shape, recipe.gate_start
    config = fresh_config(
        teacher.config, start, chunk_size=shape.chunk_size, decode_mode="token", max_loops=shape.max_loops, **gate
    )
    return student_of(teacher, recipe.seed + 1, config, start)


def measure(
    teacher: OuroForCausalLM, shallow: OuroForCausalLM | None, melt: MeltForCausalLM, recipe: Recipe, count: int
) -> list[Score]:
    """Score what shows what depth, the gate and post-training are worth; `shallow` only if it was trained."""
    tokenizer, loops = build_tokenizer(), recipe.shape.loops
    depths = [t for t in (1, 2, 3, 4, 6, 8) if t <= recipe.shape.max_loops]
    converted = plain(fresh_student(teacher, recipe, kv_gate_type="last"))
    return [
        *score(teacher, tokenizer, "looplm-demo", depths, count),
        *([] if shallow is None else score(shallow, tokenizer, "shallow", [1], count)),
        *score(converted, tokenizer, "converted", [loops], count, DECODE_MODES),
        *score(melt, tokenizer, "melt-demo", depths, count, DECODE_MODES),
        *score(melt, tokenizer, "melt-demo", [loops], count, DECODE_MODES, EXIT_THRESHOLDS),
    ]
