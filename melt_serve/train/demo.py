"""The bundled checkpoints from nothing: a LoopLM is trained, then turned into the MELT that is served.

Five stages, each resumable: the teacher; the same model with one loop, to see what depth is worth; phase 1,
interpolated transition; phase 2, attention-aligned distillation; the exit gate. Then a table of held-out questions.
"""

import random
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedTokenizerFast

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.config import DECODE_MODES, LoopLMConfig, MeltConfig
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.data import Batch, training_batch
from melt_serve.train.evaluate import Score, score
from melt_serve.train.export import export, student_card, teacher_card
from melt_serve.train.losses import cross_entropy_over_loops, distillation
from melt_serve.train.recipe import Distillation, Pretraining, Recipe, Stage
from melt_serve.train.student import Student, ask_teacher
from melt_serve.train.tasks import KINDS
from melt_serve.train.tokenizer import MAX_TOKENS, VOCABULARY, build_tokenizer
from melt_serve.train.trainer import LOG, Losses, Sitting, minutes_trained, run_stage

EXIT_BIAS = -3.0
"""The exit gate's bias before it is trained: a token leaves after a loop with a probability of about one in twenty."""

EXIT_THRESHOLDS = (0.9, 0.5)
"""Measured at the usual depth."""


def make_checkpoints(recipe: Recipe, folder: Path, target: Path, sitting: Sitting, count: int) -> list[Score]:
    """Run all stages, measure on `count` held-out questions, and write both checkpoints with their cards.

    Args:
        folder: holds states and logs; what an earlier sitting left there is gone on with.
        target: `looplm-demo` and `melt-demo` in it are replaced when everything is done, and not before.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    teacher = pretrain("teacher", recipe, recipe.teacher, tokenizer, folder, sitting)
    shallow = pretrain("shallow", recipe, recipe.shallow, tokenizer, folder, sitting)
    student = fresh_student(teacher, recipe)
    phases = (("transition", recipe.transition), ("alignment", recipe.alignment), ("exits", recipe.exits))
    for name, stage in phases:
        distil(name, stage, teacher, student, tokenizer, folder, sitting)
    melt = plain(student)
    scores = measure(teacher, shallow, melt, recipe, count)
    minutes = minutes_trained(folder / LOG)
    target.mkdir(parents=True, exist_ok=True)
    export(teacher, tokenizer, teacher_card(teacher, recipe, minutes, scores), target / LOOPLM.name)
    export(melt, tokenizer, student_card(melt, recipe, minutes, scores), target / MELT.name)
    return scores


def pretrain(
    name: str,
    recipe: Recipe,
    stage: Pretraining,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    sitting: Sitting,
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
    run_stage(name, stage, model, optimizers, losses, folder, sitting)
    return model.eval().requires_grad_(False)


def distil(
    name: str,
    stage: Distillation,
    teacher: OuroForCausalLM,
    student: Student,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    sitting: Sitting,
) -> None:
    """One phase of post-training: rows become MELT's, or attention follows the teacher's, or tokens learn to leave."""
    layers = student.config.num_hidden_layers

    def losses(step: int) -> Losses:
        batch = training_batch(tokenizer, stage.batch, stage.seed, step)
        tokens = batch.real if stage.loss_on == "all" else batch.before_reply
        loops = loops_of(stage, step)
        wanted = ask_teacher(teacher, batch, tokens, loops, attention=stage.alignment > 0)
        given = student.study(
            batch,
            tokens,
            loops,
            alpha=step / max(1, stage.steps - 1) if stage.interpolate else 1.0,
            teacher_attention=wanted.attention,
            decode_aware=runs_as_decoded(stage, step),
            thresholds=drawn_thresholds(stage, step, batch),
        )
        compared = slice(-1, None) if stage.kd_at == "last" else slice(None)
        parts = {"kd": distillation(wanted.logits[compared], given.logits[compared])}
        loss = parts["kd"]
        if stage.alignment:
            parts["attention"] = given.distance / batch.real.sum() / (layers * loops)
            loss = loss + stage.alignment * parts["attention"]
        if given.loops_run is not None:
            parts["loops"] = given.loops_run / batch.real.sum()
            loss = loss + stage.loop_price * parts["loops"]
        return {"loss": loss, **parts}

    gate = [weight for key, weight in student.named_parameters() if "_gate." in key]
    base = [weight for key, weight in student.named_parameters() if "_gate." not in key]
    groups = [{"params": base, "lr": stage.learning_rate}, {"params": gate, "lr": stage.gate_learning_rate}]
    optimizer = AdamW(groups, betas=(0.9, 0.98), weight_decay=stage.weight_decay)
    run_stage(name, stage, student, [optimizer], losses, folder, sitting)


def loops_of(stage: Stage, step: int) -> int:
    """The loops this batch runs."""
    return random.Random(f"loops {stage.seed} {step}").choice(stage.loops)


def drawn_thresholds(stage: Distillation, step: int, batch: Batch) -> Tensor | None:
    """An exit threshold for every token, evenly from [0, 1): [B, S]; None where no token of this batch leaves."""
    draw = random.Random(f"thresholds {stage.seed} {step}")
    if not stage.loop_price or draw.random() >= stage.exit_share:
        return None
    return torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(draw.getrandbits(63)))


def runs_as_decoded(stage: Distillation, step: int) -> bool:
    """Whether this batch's replies run token by token."""
    if step < stage.decode_aware_from * stage.steps:
        return False
    return random.Random(f"decode-aware {stage.seed} {step}").random() < stage.decode_aware_share


def fresh_looplm(recipe: Recipe, stage: Pretraining, tokenizer: PreTrainedTokenizerFast) -> OuroForCausalLM:
    """A LoopLM before its first step; by default it will run the recipe's loops, or all it is trained for if fewer."""
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
    """The teacher's weights with a fresh gate, as `melt-serve convert` makes it; `gate` are config fields."""
    facts = {
        key: value for key, value in teacher.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    shape = recipe.shape
    config = MeltConfig(**facts, chunk_size=shape.chunk_size, decode_mode="token", max_loops=shape.max_loops, **gate)
    torch.manual_seed(recipe.seed + 1)
    student = Student(config).train()
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def measure(
    teacher: OuroForCausalLM, shallow: OuroForCausalLM, melt: MeltForCausalLM, recipe: Recipe, count: int
) -> list[Score]:
    """The table that shows what depth, the gate and post-training are worth."""
    tokenizer, loops = build_tokenizer(), recipe.shape.loops
    depths = [t for t in (1, 2, 3, 4, 6, 8) if t <= recipe.shape.max_loops]
    converted = plain(fresh_student(teacher, recipe, kv_gate_type="last"))
    return [
        *score(teacher, tokenizer, "looplm-demo", depths, count),
        *score(shallow, tokenizer, "shallow", [1], count),
        *score(converted, tokenizer, "converted", [loops], count, DECODE_MODES),
        *score(melt, tokenizer, "melt-demo", depths, count, DECODE_MODES),
        *score(melt, tokenizer, "melt-demo", [loops], count, DECODE_MODES, EXIT_THRESHOLDS),
    ]


def plain(student: Student) -> MeltForCausalLM:
    """The student as the reference model, to be evaluated and saved."""
    melt = MeltForCausalLM(student.config)
    melt.load_state_dict(student.state_dict())
    return melt.eval()
