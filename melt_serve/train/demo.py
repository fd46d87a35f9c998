"""The bundled checkpoints from nothing: a LoopLM is trained, then turned into the MELT that is served.

Four stages, each resumable: the teacher; the same model with one loop, to see what depth is worth; phase 1,
interpolated transition; phase 2, attention-aligned distillation. Then a table of held-out questions.
"""

import random
from pathlib import Path

import torch
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedTokenizerFast

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.config import DECODE_MODES, LoopLMConfig, MeltConfig
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from melt_serve.train.data import training_batch
from melt_serve.train.evaluate import Score, score
from melt_serve.train.export import export, student_card, teacher_card
from melt_serve.train.losses import cross_entropy_over_loops, distillation
from melt_serve.train.recipe import Distillation, Pretraining, Recipe
from melt_serve.train.student import Student, ask_teacher
from melt_serve.train.tokenizer import MAX_TOKENS, VOCABULARY, build_tokenizer
from melt_serve.train.trainer import LOG, Losses, Sitting, minutes_trained, run_stage


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
    teacher = pretrain("teacher", recipe, recipe.teacher, recipe.shape.loops, tokenizer, folder, sitting)
    shallow = pretrain("shallow", recipe, recipe.shallow, 1, tokenizer, folder, sitting)
    student = fresh_student(teacher, recipe)
    for name, stage in (("transition", recipe.transition), ("alignment", recipe.alignment)):
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
    loops: int,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    sitting: Sitting,
) -> OuroForCausalLM:
    """Train a LoopLM of this many loops from nothing: cross-entropy on the replies, at every loop."""
    model = fresh_looplm(recipe, stage, loops, tokenizer)

    def losses(step: int) -> Losses:
        batch = training_batch(tokenizer, stage.batch, stage.seed, step)
        output = model(batch.input_ids, attention_mask=batch.attention_mask, output_loops=True)
        return {"loss": cross_entropy_over_loops(output.loop_logits[:, batch.before_reply], batch.reply)}

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
    """One phase of post-training: the student's rows become MELT's, or its attention follows the teacher's."""
    loops, layers = student.config.total_ut_steps, student.config.num_hidden_layers

    def losses(step: int) -> Losses:
        batch = training_batch(tokenizer, stage.batch, stage.seed, step)
        tokens = batch.real if stage.loss_on == "all" else batch.before_reply
        wanted = ask_teacher(teacher, batch, tokens, attention=stage.alignment > 0)
        alpha = step / max(1, stage.steps - 1) if stage.interpolate else 1.0
        given = student.study(batch, tokens, alpha, wanted.attention, runs_as_decoded(stage, step))
        loss = kd = distillation(wanted.logits, given.logits)
        if not stage.alignment:
            return {"loss": loss}
        assert given.distance is not None
        apart = given.distance / batch.real.sum() / (layers * loops)
        return {"loss": loss + stage.alignment * apart, "kd": kd, "attention": apart}

    gate = [weight for key, weight in student.named_parameters() if "kv_gate" in key]
    base = [weight for key, weight in student.named_parameters() if "kv_gate" not in key]
    groups = [{"params": base, "lr": stage.learning_rate}, {"params": gate, "lr": stage.gate_learning_rate}]
    optimizer = AdamW(groups, betas=(0.9, 0.98), weight_decay=stage.weight_decay)
    run_stage(name, stage, student, [optimizer], losses, folder, sitting)


def runs_as_decoded(stage: Distillation, step: int) -> bool:
    """Whether this batch's replies run token by token."""
    if step < stage.decode_aware_from * stage.steps:
        return False
    return random.Random(f"decode-aware {stage.seed} {step}").random() < stage.decode_aware_share


def fresh_looplm(recipe: Recipe, stage: Pretraining, loops: int, tokenizer: PreTrainedTokenizerFast) -> OuroForCausalLM:
    """A LoopLM before its first step."""
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
        total_ut_steps=loops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = OuroForCausalLM(config).train()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=stage.embedding_std)
        model.lm_head.weight.copy_(0.1 * model.model.embed_tokens.weight)
    return model


def fresh_student(teacher: OuroForCausalLM, recipe: Recipe, **gate: str) -> Student:
    """The teacher's weights with a fresh gate, as `melt-serve convert` makes it; `gate` are config fields."""
    facts = {
        key: value for key, value in teacher.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    config = MeltConfig(**facts, chunk_size=recipe.shape.chunk_size, decode_mode="token", **gate)
    torch.manual_seed(recipe.seed + 1)
    student = Student(config).train()
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def measure(
    teacher: OuroForCausalLM, shallow: OuroForCausalLM, melt: MeltForCausalLM, recipe: Recipe, count: int
) -> list[Score]:
    """The table that shows what depth, the gate and post-training are worth."""
    tokenizer, loops = build_tokenizer(), recipe.shape.loops
    depths = [t for t in (1, 2, 4, 8) if t <= loops]
    converted = plain(fresh_student(teacher, recipe, kv_gate_type="last"))
    return [
        *score(teacher, tokenizer, "looplm-demo", depths, count),
        *score(shallow, tokenizer, "shallow", [1], count),
        *score(converted, tokenizer, "converted", [loops], count, DECODE_MODES),
        *score(melt, tokenizer, "melt-demo", depths, count, DECODE_MODES),
    ]


def plain(student: Student) -> MeltForCausalLM:
    """The student as the reference model, to be evaluated and saved."""
    melt = MeltForCausalLM(student.config)
    melt.load_state_dict(student.state_dict())
    return melt.eval()
