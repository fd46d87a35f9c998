"""What a run's folder says the run is: its recipe, which of its stages have begun, and what may still be changed."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from melt_serve.checkpoint_path import is_there
from melt_serve.train.atomic import replacing
from melt_serve.train.data.sequences import INDEX
from melt_serve.train.inputs import INPUTS, really
from melt_serve.train.loop.loggers import WANDB_ID
from melt_serve.train.loop.logs import EVALUATIONS, LOG
from melt_serve.train.recipe import PHASES, PostTraining
from melt_serve.train.session import TrainingError

RECIPE = "recipe.json"
MAY_CHANGE = (
    "output",
    "gate_rank",
    "save_steps",
    "save_minutes",
    "most_skipped",
    "keep_last",
    "keep_every",
    "evaluation",
    "report_to",
    "micro_batch",
    "checkpoint_chunks",
    "compile",
    "data.broken",
)
"""Fields that a run may be resumed with other values of; the losses stay the same, up to rounding."""
YOUNGER = {"data.learn": "replies", "train_base": "full"}
"""Fields that runs of before do not have written down, with what they did."""
STAGES = ("order", "further", *PHASES)

Facts = dict[str, Any]
"""A recipe as JSON."""


def state_of(folder: Path, stage: str) -> Path:
    """Return where a stage's state is kept."""
    return folder / f"{stage}.state.pt"


def forget_unsaved(folder: Path) -> None:
    """Forget a run of which no state was saved: it will begin anew, and may be another one."""
    if not any(folder.glob("*.state.pt")):
        for name in (RECIPE, INPUTS, INDEX, LOG, EVALUATIONS, WANDB_ID):
            (folder / name).unlink(missing_ok=True)


def facts_of(recipe: PostTraining) -> Facts:
    """Return the recipe as JSON, its paths as they are from everywhere."""
    files = tuple(absolute(file) for file in recipe.data.files)
    asked = recipe.evaluation
    recipe = replace(
        recipe,
        teacher=absolute(recipe.teacher),
        student=None if recipe.student is None else absolute(recipe.student),
        output=os.path.abspath(recipe.output),
        data=replace(recipe.data, files=files),
        evaluation=asked and replace(asked, files=tuple(absolute(file) for file in asked.files)),
    )
    return dict(json.loads(json.dumps(asdict(recipe))))


def absolute(named: str) -> str:
    """Return a path from the root; a name on the hub as it is."""
    return os.path.abspath(named) if is_there(named) else named


def stage_reached(recipe: PostTraining, folder: Path) -> str:
    """Return the stage that a run goes on with: the last that has a state, or its first."""
    return [recipe.names[0], *(name for name in recipe.names if state_of(folder, name).exists())][-1]


def newest_state(folder: Path, recipe: PostTraining) -> Path:
    """Return the state that a run has come to.

    Raises:
        TrainingError: it has none yet.
    """
    state = state_of(folder, stage_reached(recipe, folder))
    if state.exists():
        return state
    raise TrainingError(f"{folder} has no state yet: the run saves one every save_steps={recipe.save_steps} steps")


def check_recipe(facts: Facts, folder: Path) -> None:
    """See that the recipe is that of the run that is there, if there is one.

    Args:
        facts: of the recipe, see `facts_of`.

    Raises:
        TrainingError: it is another one.
    """
    if (folder / RECIPE).exists():
        changed = changes(read_facts(folder), facts, folder)
        if changed:
            raise TrainingError(
                f"{folder} holds a run with another recipe ({', '.join(changed)} differ); "
                "say the same again, or use another --run folder"
            )


def note_recipe(facts: Facts, folder: Path) -> None:
    """Write down what the run is, once all that it says is known to be good: it is what a resumed run reads."""
    with replacing(folder / RECIPE) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> Facts:
    """Read the recipe that was written down.

    Raises:
        TrainingError: there is none, or it is damaged.
    """
    path = folder / RECIPE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TrainingError(
            f"{folder} holds no run of a post-training: it has no {RECIPE}; name its --run folder"
        ) from None
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); delete it, if the recipe is that of before") from error


def changes(known: Facts, facts: Facts, folder: Path) -> list[str]:
    """Name the fields that differ, and may not.

    Of stages, the last one that has begun may take more steps or fewer, and those after it may be any.
    """
    before, now = flat(known), flat(facts)
    changed = [
        key for key, value in now.items() if key not in MAY_CHANGE and before.get(key, YOUNGER.get(key)) != value
    ]
    tables, new_tables = tables_of(known), tables_of(facts)
    names, new_names = names_of(known), names_of(facts)
    begun = [number for number, name in enumerate(names) if state_of(folder, name).exists()]
    last = max(begun, default=-1)
    if new_names[: last + 1] != names[: last + 1]:
        return [*changed, "the stages that have begun"]
    for name in names[: last + 1]:
        one, other = tables[name], new_tables[name]
        free = {"steps"} if name == names[last] else set()
        changed += [f"{name}.{key}" for key in other if key not in free and one.get(key) != other[key]]
    return changed


def flat(facts: Facts) -> Facts:
    """Return the fields that are not of stages, the data's as `data.files`; files by where they are."""
    fields = {key: value for key, value in facts.items() if key not in (*STAGES, "data")}
    fields |= {f"data.{key}": value for key, value in facts["data"].items()}
    for name in ("teacher", "student"):
        fields[name] = really(fields[name]) if fields.get(name) else None
    fields["data.files"] = [really(file) for file in fields["data.files"]]
    return fields


def tables_of(facts: Facts) -> dict[str, Facts]:
    """Return all stages that a recipe describes, by name."""
    own = {name: facts[name] for name in PHASES if facts.get(name)}
    return own | (facts.get("further") or {})


def names_of(facts: Facts) -> list[str]:
    """Return the names of a recipe's stages, in the order they run."""
    return list(facts.get("order") or tables_of(facts))
