"""What a run is made from, by content: its teacher's files and its data. They must be the same in every session."""

import json
from collections.abc import Mapping
from pathlib import Path

from melt_serve.checksums import sum_of
from melt_serve.train.atomic import replacing
from melt_serve.train.recipe import PostTraining
from melt_serve.train.session import TrainingError

INPUTS = "inputs.json"
OF_TEACHER = ("config.json", "*.safetensors", "tokenizer*", "chat_template*", "vocab.*", "merges.txt")


def note_inputs(files: Mapping[str, Path], folder: Path) -> None:
    """Write down the checksums of what the run is made from, or see that they are those of before.

    A file with the size and the time of before is not read again.

    Args:
        files: what the run is made from, by the names that the user gave: where the hub's cache has a file may change.

    Raises:
        TrainingError: a file is another one, or is gone.
    """
    path = folder / INPUTS
    begun, known = path.exists(), read_inputs(path)
    facts = {}
    for name, file in files.items():
        status, before = file.stat(), known.get(name)
        stamp = {"bytes": status.st_size, "modified": status.st_mtime_ns}
        if before is None or any(before.get(key) != value for key, value in stamp.items()):
            facts[name] = {**stamp, "sha256": sum_of(file)}
        else:
            facts[name] = before
    changed = [name for name in known if name not in facts or facts[name]["sha256"] != known[name].get("sha256")]
    changed += [name for name in facts if begun and name not in known]
    if changed:
        raise TrainingError(
            f"{changed[0]} is not what the run in {folder} was begun with; put back what was there, or use another "
            "--run folder"
        )
    with replacing(path) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_inputs(path: Path) -> dict[str, dict[str, object]]:
    """Read what was written down; nothing where a run of before wrote nothing.

    Raises:
        TrainingError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"{path} is damaged ({error}); delete it, if teacher and data are those of before"
        ) from error


def input_files(recipe: PostTraining, teacher: Path) -> dict[str, Path]:
    """Return the files of the teacher, whose folder is given, and of the data, in an order that is always the same."""
    files = teacher_files(recipe.teacher, teacher)
    for name in recipe.data.files:
        data = Path(name)
        of_data = sorted(file for file in data.rglob("*") if file.is_file()) if data.is_dir() else [data]
        files |= {str(file): file for file in of_data}
    return files


def teacher_files(named: str, folder: Path) -> dict[str, Path]:
    """Return the files of a teacher that a run depends on, by name; `named` is what the user calls the folder."""
    found = sorted({file for pattern in OF_TEACHER for file in folder.glob(pattern) if file.is_file()})
    return {str(Path(named) / file.name): file for file in found}
