"""What `who_is_where.yaml` asks."""

from datasets import Dataset, DatasetDict

from melt_serve.task.evaluate import heldout


def heldout_questions(questions: int = 1000, **_: object) -> DatasetDict:
    """The first held-out questions; `--metadata '{"questions": 50}'` asks fewer, as `--limit 50` does."""
    rows = [{"prompt": question.prompt, "answer": question.answer} for question in heldout(questions)]
    return DatasetDict(test=Dataset.from_list(rows))
