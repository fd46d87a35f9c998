"""What `who_is_where.yaml` asks."""

from datasets import Dataset, DatasetDict

from melt_serve.task.evaluate import heldout


def heldout_questions(questions: int = 1000, **_: object) -> DatasetDict:
    """Return the first held-out questions; `--metadata '{"questions": 50}'` asks fewer, as `--limit 50` does."""
    asked = [{"prompt": question.prompt, "answer": question.answer} for question in heldout(questions)]
    return DatasetDict(test=Dataset.from_list(asked))
