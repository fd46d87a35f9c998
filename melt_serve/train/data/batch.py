"""A batch of sequences: chats, or packs of documents."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from melt_serve.task.who_is_where import SILENT_STEPS

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A batch of B chats, right-padded, or of B packs of documents.

    Attributes:
        input_ids, attention_mask: [B, S].
        labels: [B, S], the token itself where it belongs to the reply or its end mark, else -100; in packs also
            -100 where a document begins, because the token before it is another's.
        prompt_lengths: [B], tokens before the reply; not of packs.
        replies: of the bundled task, [SILENT_STEPS + 1, tokens], at i the replies within i steps, in the order of
            `before_reply`.
        document_starts: of packs, [B, S], the column where each token's document begins.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_lengths: Tensor | None = None
    replies: Tensor | None = None
    document_starts: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The mask of tokens, [B, S]: true where there is one."""
        return self.attention_mask.bool()

    @property
    def before_reply(self) -> Tensor:
        """The mask of answers, [B, S]: true where the next token is one of the reply."""
        return torch.nn.functional.pad(self.labels[:, 1:] != IGNORED, (0, 1))

    @property
    def generated(self) -> Tensor:
        """The mask of what is not prompt, [B, S]: true from the first learnt token of each document on."""
        columns = torch.arange(self.labels.shape[1], device=self.labels.device)
        if self.prompt_lengths is not None:
            return self.real & (columns >= self.prompt_lengths[:, None])
        starts = torch.zeros_like(self.labels) if self.document_starts is None else self.document_starts
        learnt = (self.labels != IGNORED).long()
        before = learnt.cumsum(-1) - learnt
        return self.real & (before + learnt > before.gather(1, starts))

    def reply_by_loop(self, loops: int) -> Tensor:
        """Return what each loop is to answer, [T, tokens]: loop t the reply within t - 1 steps, the last one all."""
        assert self.replies is not None
        within = torch.arange(loops).clamp(max=SILENT_STEPS)
        within[-1] = SILENT_STEPS
        return self.replies[within]


def moved(batch: Batch, device: torch.device) -> Batch:
    """Copy the batch to that device."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: each.to(device) for name, each in values.items() if isinstance(each, Tensor)})
