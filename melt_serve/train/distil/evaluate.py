"""What a run's student answers on held-out documents while it learns: distance from the teacher, and samples.

Before the first step the student is what `convert` would make of the teacher; so the first line says what post-training
has to mend.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from melt_serve.answers import end_marks
from melt_serve.config import DECODE_MODES, DecodeMode
from melt_serve.modeling import OuroForCausalLM
from melt_serve.modeling.chunks import Chunk
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.losses import ANSWERS_AT_ONCE, divergence
from melt_serve.train.distil.student import Student
from melt_serve.train.distil.teacher import Answers, ask_teacher
from melt_serve.train.loop.distributed import rank
from melt_serve.train.loop.loggers import Show
from melt_serve.train.loop.logs import EVALUATIONS, read_log
from melt_serve.train.recipe import Evaluation

Numbers = dict[str, list[float]]


@dataclass(frozen=True)
class Heldout:
    """Documents that a run does not learn from, each alone in its row, and how often they are asked."""

    batches: Sequence[Batch]
    tokenizer: PreTrainedTokenizerFast
    asked: Evaluation

    def watch(
        self, name: str, first: bool, last: int, teacher: OuroForCausalLM, student: Student, folder: Path
    ) -> Callable[[int, Show], None]:
        """Return what evaluates a stage's student every so many steps, and notes it in `evaluations.jsonl`.

        Args:
            name, first, last: the stage's name, whether it is the run's first, and its steps.
        """

        def evaluate_if_due(done: int, show: Show) -> None:
            due = done == last or (done % self.asked.steps == 0 and (done > 0 or first))
            if not due or (name, done) in {(each["stage"], each["step"]) for each in read_log(folder / EVALUATIONS)}:
                return
            begun = time.monotonic()
            numbers = self.evaluate(teacher, student)
            if isinstance(student, FSDPModule):
                student.reshard()
            if rank() > 0:
                return
            show({"evaluation": numbers}, done)
            entry = {"stage": name, "step": done, **numbers, "seconds": time.monotonic() - begun}
            with (folder / EVALUATIONS).open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            tqdm.write(summary(name, done, numbers), file=sys.stderr)

        return evaluate_if_due

    @torch.no_grad()
    def evaluate(self, teacher: OuroForCausalLM, student: Student) -> dict[str, Any]:
        """Measure both decode modes at the C that the student is served at, and let it answer some of the prompts.

        Returns:
            By decode mode: `kl`, KL(teacher || student) in nats, `agreement`, the share of first choices that are the
            teacher's, and `ce`, the cross-entropy of the documents, each a list by loop, mean over the learnt tokens;
            the teacher's `ce`; `z`, the gate's mean by the number of the loop, from the second on, in chunks; and
            `samples`.
        """
        loops = student.config.total_ut_steps
        found: dict[str, list[Tensor]] = {}
        tokens = 0
        z = torch.zeros(2, loops, dtype=torch.float64)
        for batch in self.batches:
            targets = batch.labels.roll(-1, 1)[batch.before_reply]
            wanted = ask_teacher(teacher, batch, batch.before_reply, loops, attention=False)
            tokens += len(targets)
            for mode in DECODE_MODES:
                with decoding_as(student, mode), gate_means(student, z if mode == "chunk" else torch.zeros_like(z)):
                    given = student.run_batch(
                        batch, batch.before_reply, loops, decode_aware="tokens" if mode == "token" else None
                    )
                found.setdefault(mode, []).append(compared(wanted, given, targets))
            found.setdefault("teacher", []).append(compared(wanted, wanted, targets))
        means = {who: (torch.stack(sums).sum(0) / tokens).tolist() for who, sums in found.items()}
        numbers: dict[str, Any] = {
            mode: dict(zip(("kl", "agreement", "ce"), means[mode], strict=True)) for mode in DECODE_MODES
        }
        numbers["teacher"] = {"ce": means["teacher"][2]}
        if z[1].any():
            numbers["z"] = dict(zip(map(str, range(2, loops + 1)), (z[0, 1:] / z[1, 1:]).tolist(), strict=True))
        return numbers | {"samples": list(self.samples(student))}

    def samples(self, student: Student) -> Iterator[dict[str, str]]:
        """Yield the first documents' prompts with what the student answers, greedily, and what stands there."""
        rows = ((batch, row) for batch in self.batches for row in range(len(batch.input_ids)))
        for batch, row in islice(rows, self.asked.samples):
            assert batch.prompt_lengths is not None
            ids, asked = batch.input_ids[row][batch.real[row]], int(batch.prompt_lengths[row])
            answer = student.generate(
                ids[None, :asked],
                attention_mask=torch.ones_like(ids[None, :asked]),
                max_new_tokens=self.asked.sample_tokens,
                do_sample=False,
                eos_token_id=end_marks(self.tokenizer) or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            texts = (ids[:asked], answer[0, asked:], ids[asked:])
            yield dict(zip(("prompt", "answer", "wanted"), map(self.tokenizer.decode, texts), strict=True))


def summary(name: str, done: int, numbers: Mapping[str, Any]) -> str:
    """Say in one line how far the student's last loop is from the teacher's."""
    modes = (
        f"{mode} mode KL {numbers[mode]['kl'][-1]:.4f}, {numbers[mode]['agreement'][-1]:.1%} agreed"
        for mode in DECODE_MODES
    )
    return f"{name}, {done} steps, held out: {'; '.join(modes)}"


def compared(teacher: Answers, student: Answers, targets: Tensor) -> Tensor:
    """Sum KL(teacher || student), equal first choices and the student's cross-entropy over tokens: [3, T]."""
    sums = torch.zeros(3, len(student.states), dtype=torch.float64)
    for loop, (wanted_states, given_states) in enumerate(zip(teacher.states, student.states, strict=True)):
        for start in range(0, len(targets), ANSWERS_AT_ONCE):
            here = slice(start, start + ANSWERS_AT_ONCE)
            wanted = F.linear(wanted_states[here], teacher.head).float()
            given = F.linear(given_states[here], student.head).float()
            agreed = (wanted.argmax(-1) == given.argmax(-1)).sum()
            entropy = F.cross_entropy(given, targets[here], reduction="sum")
            sums[:, loop] += torch.stack([divergence(wanted, given), agreed, entropy]).double().cpu()
    return sums


@contextmanager
def decoding_as(student: Student, mode: DecodeMode) -> Iterator[None]:
    """Let the student decode in this mode for a while."""
    before, student.config.decode_mode = student.config.decode_mode, mode
    try:
        yield
    finally:
        student.config.decode_mode = before


@contextmanager
def gate_means(student: Student, sums: Tensor) -> Iterator[None]:
    """Add up z over dimensions' means of tokens and layers, and their number: [2, T] by loop; loop 1 has no z."""
    present: list[Tensor] = []
    run_chunk = student.run_chunk

    def chunked(x: Tensor, chunk: Chunk, *rest: Any) -> list[Tensor]:
        present[:] = [chunk.positions >= 0]
        return run_chunk(x, chunk, *rest)

    def note(gate: nn.Module, arguments: tuple[Any, ...]) -> None:
        n, h, loop = arguments
        if h is not None:
            z = gate.keep(n, h, loop)  # type: ignore[operator]
            z = z.mean(-1) if isinstance(z, Tensor) else torch.full(n.shape[:-1], z, device=n.device)
            members = present[0]
            sums[:, loop - 1] += torch.stack([z[members].double().sum(), members.sum().double()]).cpu()

    hooks = [layer.self_attn.kv_gate.register_forward_pre_hook(note) for layer in student.model.layers]
    student.run_chunk = chunked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del student.run_chunk
        for hook in hooks:
            hook.remove()
