"""One phase of post-training: rows become MELT's, or attention follows the teacher's, or tokens learn to leave.

Source: arXiv 2605.07721; README.md.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import AdamW

from melt_serve.modeling import OuroForCausalLM
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.losses import distillation_by_loop
from melt_serve.train.distil.shared_base import is_gate
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import ask_teacher
from melt_serve.train.loop.distributed import all_reduce_sum, exchange_gradients, rank, world_size
from melt_serve.train.loop.trainer import Losses, Run, Watch, run_stage, unwatched
from melt_serve.train.stages import Distillation, Stage

PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def run_phase(
    name: str,
    stage: Distillation,
    teacher: OuroForCausalLM,
    student: Student,
    batches: Callable[[int], Sequence[Batch]],
    run: Run,
    flops: Callable[[Distillation], float] | None = None,
    watch: Watch = unwatched,
) -> None:
    """Train the student on what the teacher says.

    Args:
        name: the phase's, unique in its folder.
        batches: returns this process's micro-batches of step i; their gradients are added up, as those of one batch.
        flops: counts those of a step of a stage on this process's device, to be logged by the second.
        watch: see `run_stage`.

    Raises:
        Paused, TrainingError: see `run_stage`.
    """
    trained = 0

    def losses(step: int) -> Losses:
        nonlocal trained
        micro_batches = batches(step)
        answers = sum(int(wanted_tokens(stage, batch).sum()) for batch in micro_batches)
        tokens = torch.stack([batch.real.sum() for batch in micro_batches]).sum()
        counts = all_reduce_sum(torch.stack([tokens.new_tensor(answers), tokens]))
        trained = int(counts[1])
        done: Losses = {}
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            exchange_gradients(student, last)
            number = rank() + i * world_size()
            parts = phase_losses(stage, step, number, teacher, student, batch, int(counts[0]), counts[1])
            if not last:
                (world_size() * parts["loss"]).backward()
            done = {part: value + done[part].detach() if done else value for part, value in parts.items()}
        return done if world_size() == 1 else of_all_processes(done)

    def facts(step: int, seconds: float) -> dict[str, float]:
        loops, size = loops_of(stage, step), drawn_chunk_size(stage, step)
        told: dict[str, float] = {"loops_asked": loops, "tokens_per_second": trained / seconds}
        told |= {"alpha": alpha_of(stage, step)} if stage.interpolate else {}
        told |= {"chunk_size": size} if size else {}
        if flops is None:
            return told
        decoded = 0.0 if runs_as_decoded(stage, step) else 1.0
        rate = flops(replace(stage, loops=(loops,), decode_aware_from=decoded, decode_aware_share=1.0)) / seconds
        peak = peak_of(student.device)
        return told | {"flops_per_second": rate} | ({} if peak is None else {"arithmetic_share": rate / peak})

    learnt = [(key, weight) for key, weight in student.named_parameters() if weight.requires_grad]
    gate = [weight for key, weight in learnt if is_gate(key)]
    base = [weight for key, weight in learnt if not is_gate(key)]
    groups = [{"params": base, "lr": stage.learning_rate}, {"params": gate, "lr": stage.gate_learning_rate}]
    optimizer = AdamW(groups, betas=(0.9, 0.98), weight_decay=stage.weight_decay)
    run_stage(name, stage, student, [optimizer], losses, run, facts, watch)


def of_all_processes(losses: Losses) -> Losses:
    """Sum the losses over all processes; the gradient stays this process's, times the number FSDP divides it by."""
    flat = all_reduce_sum(torch.cat([value.detach().flatten() for value in losses.values()]))
    sums = flat.split([value.numel() for value in losses.values()])
    values = {part: each.view_as(losses[part]) for part, each in zip(losses, sums, strict=True)}
    own = world_size() * losses["loss"]
    return {**values, "loss": own + (values["loss"] - own).detach()}


def phase_losses(
    stage: Distillation,
    step: int,
    number: int,
    teacher: OuroForCausalLM,
    student: Student,
    batch: Batch,
    answers: int,
    tokens: Tensor,
) -> Losses:
    """Compute one micro-batch's share of a step's loss, and its parts.

    Args:
        number: the micro-batch's in its step.
        answers, tokens: how many of the whole step the means are over: tokens with a distilled answer, and all.
    """
    wanted_at = wanted_tokens(stage, batch)
    loops = loops_of(stage, step)
    wanted = ask_teacher(teacher, batch, wanted_at, loops, attention=stage.alignment > 0)
    given = student.run_batch(
        batch,
        wanted_at,
        loops,
        alpha=alpha_of(stage, step),
        teacher_attention=wanted.attention,
        distance=stage.distance,
        decode_aware=stage.decode_aware_by if runs_as_decoded(stage, step) else None,
        thresholds=drawn_thresholds(stage, step, batch, number),
        detach_rows=stage.detach_rows,
        chunk_size=drawn_chunk_size(stage, step),
    )
    compared = slice(-1, None) if stage.kd_at == "last" else slice(None)
    of_teacher, of_student = wanted.states[compared], given.states[compared]
    kd, by_loop = distillation_by_loop(of_teacher, wanted.head, of_student, given.head, answers)
    parts, loss = {"kd": kd, "kd_by_loop": by_loop}, kd
    if stage.alignment:
        parts["attention"] = given.distance / tokens / (student.config.num_hidden_layers * loops)
        loss = loss + stage.alignment * parts["attention"]
    if given.loops_run is not None:
        parts["loops"] = given.loops_run / tokens
        loss = loss + stage.loop_price * parts["loops"]
    return {"loss": loss, **parts}


def wanted_tokens(stage: Distillation, batch: Batch) -> Tensor:
    """Mark the tokens where the student's answer is compared with the teacher's, [B, S]."""
    return batch.real if stage.loss_on == "all" else batch.before_reply


def alpha_of(stage: Distillation, step: int) -> float:
    """Return alpha, the share of MELT's rows in a step's; what is left are the LoopLM's."""
    return step / max(1, stage.steps - 1) if stage.interpolate else 1.0


def peak_of(device: torch.device) -> float | None:
    """Return a device's FLOPs a second in dense bfloat16, as its maker states them; None where we do not know."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def loops_of(stage: Stage, step: int) -> int:
    """Draw the loops that a step's batch runs."""
    return random.Random(f"loops {stage.seed} {step}").choice(stage.loops)


def drawn_chunk_size(stage: Distillation, step: int) -> int | None:
    """Draw C of a step's batch; None for the student's own."""
    if not stage.chunk_sizes:
        return None
    return random.Random(f"chunk size {stage.seed} {step}").choice(stage.chunk_sizes)


def drawn_thresholds(stage: Distillation, step: int, batch: Batch, number: int = 0) -> Tensor | None:
    """Draw an exit threshold for every token, evenly from [0, 1): [B, S]; None where no token of this batch leaves."""
    draw = random.Random(f"thresholds {stage.seed} {step}")
    if not stage.loop_price or draw.random() >= stage.exit_share:
        return None
    generator = torch.Generator().manual_seed(draw.getrandbits(63) + number)
    return torch.rand(batch.input_ids.shape, generator=generator).to(batch.input_ids.device)


def runs_as_decoded(stage: Distillation, step: int) -> bool:
    """Draw whether a step's replies run as `token` mode decodes them."""
    if step < stage.decode_aware_from * stage.steps:
        return False
    return random.Random(f"decode-aware {stage.seed} {step}").random() < stage.decode_aware_share
