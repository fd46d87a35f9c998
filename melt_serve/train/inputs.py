"""What a run is made from, by content: its teacher's files and its data. They must be the same in every session."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from melt_serve.checkpoint_path import is_there
from melt_serve.checksums import sum_of
from melt_serve.train.atomic import replacing
from melt_serve.train.recipe import PostTraining
from melt_serve.train.session import TrainingError

INPUTS = "inputs.json"
OF_TEACHER = ("config.json", "*.safetensors", "tokenizer*", "chat_template*", "vocab.*", "merges.txt")


def note_inputs(
    teacher: Mapping[str, Path],
    data: Mapping[str, Path],
    folder: Path,
    accept_changes: Callable[[], bool] = lambda: False,
) -> None:
    """Write down the checksums of what the run is made from, or see that they are those of before.

    A file with the size and the time of before is not read again.

    Args:
        teacher, data: files by the names that the user gave: where the hub's cache has a file may change.
        accept_changes: asked where files of the data are others: whether what the run has read of them is the same.

    Raises:
        TrainingError: a file is another one, or is gone.
    """
    path = folder / INPUTS
    begun, known = path.exists(), {really(name): fact for name, fact in read_inputs(path).items()}
    facts = {}
    for name, file in {**teacher, **data}.items():
        name = really(name)
        status, before = file.stat(), known.get(name)
        stamp = {"bytes": status.st_size, "modified": status.st_mtime_ns}
        if before is None or any(before.get(key) != value for key, value in stamp.items()):
            facts[name] = {**stamp, "sha256": sum_of(file)}
        else:
            facts[name] = before
    changed = [name for name in known if name not in facts or facts[name]["sha256"] != known[name].get("sha256")]
    changed += [name for name in facts if begun and name not in known]
    mendable = {really(name) for name in data}
    if changed and mendable.issuperset(changed) and accept_changes():
        print(f"{changed[0]} has changed; what the run has read of it has not, so it goes on", file=sys.stderr)
    elif changed:
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


def really(named: str) -> str:
    """Return the one path of what a user may name in several ways; a name on the hub as it is."""
    return os.path.realpath(named) if is_there(named) else named


def data_files(recipe: PostTraining) -> dict[str, Path]:
    """Return the files of the data that are here, by name, in an order that is always the same."""
    files: dict[str, Path] = {}
    for name in recipe.data.files:
        data = Path(name)
        if not data.exists():
            continue
        of_data = sorted(file for file in data.rglob("*") if file.is_file()) if data.is_dir() else [data]
        files |= {str(file): file for file in of_data}
    return files


def teacher_files(named: str, folder: Path) -> dict[str, Path]:
    """Return the files of a teacher that a run depends on, by name; `named` is what the user calls the folder."""
    found = sorted({file for pattern in OF_TEACHER for file in folder.glob(pattern) if file.is_file()})
    return {str(Path(named) / file.name): file for file in found}
