"""Recipes in TOML files, and what the command line changes of them."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from melt_serve.train.recipe import STAGES, PostTraining, Recipe
from melt_serve.train.recipes import RECIPES, bundled_recipes

KINDS: dict[str, type[Recipe] | type[PostTraining]] = {"bundled": Recipe, "post-training": PostTraining}


class RecipeError(ValueError):
    """A recipe cannot be followed; the message names field, value and remedy."""


def load_recipe(
    name: str, overrides: Sequence[str] = (), defaults: Mapping[str, object] = MappingProxyType({})
) -> Recipe | PostTraining:
    """Load the recipe of that name or file, changed by `key.path=value` words.

    Args:
        name: a bundled recipe's, see `bundled_recipes`, or a TOML file's path.
        overrides: values as TOML writes them; what is none is taken as text.
        defaults: of a post-training's fields that neither file nor overrides name.

    Raises:
        RecipeError: no such recipe, or a field or value that it cannot have.
    """
    path = find_recipe(name)
    table = read_table(path, overrides)
    kind = KINDS.get(table.pop("kind", None))
    if kind is None:
        raise RecipeError(f"{path} must say what it is: kind = {' or '.join(map(repr, KINDS))}")
    if kind is PostTraining:
        table = {**defaults, **table}
    recipe = checked(table, kind, path.name)
    return recipe.seeded(recipe.seed) if isinstance(recipe, Recipe) else recipe


def written_recipe(facts: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> PostTraining:
    """Return the recipe that a run's folder has written down, changed by `key.path=value` words.

    Raises:
        RecipeError: a field or value that it cannot have.
    """
    of_stages = {"seed", "batch"}
    table: dict[str, Any] = {key: value for key, value in facts.items() if value is not None}
    for stages in (table, table.get("further", {})):
        for name in [name for name, each in stages.items() if isinstance(each, dict) and of_stages <= each.keys()]:
            stages[name] = {key: value for key, value in stages[name].items() if key not in of_stages}
    for word in overrides:
        override(table, word)
    recipe = checked(table, PostTraining, folder.name)
    assert isinstance(recipe, PostTraining)
    return recipe


def checked(table: dict[str, Any], kind: type[Recipe] | type[PostTraining], name: str) -> Recipe | PostTraining:
    """Return the recipe that a table describes.

    Args:
        name: of where it stands.

    Raises:
        RecipeError: a field or value that it cannot have.
    """
    of_all_stages = {"seed": "seed"} if kind is Recipe else {"seed": "seed", "batch": "batch_tokens"}
    further = table.get("further")
    tables = table | {f"further.{key}": each for key, each in (further if isinstance(further, dict) else {}).items()}
    for (stage, each), (field, instead) in product(tables.items(), of_all_stages.items()):
        if (stage in STAGES or stage.startswith("further.")) and isinstance(each, dict) and field in each:
            raise RecipeError(f"{name}: {stage}.{field} is the same in all stages: set {instead} instead")
    try:
        return TypeAdapter(kind).validate_python(table)
    except ValidationError as error:
        said = "; ".join(complaint(kind, each) for each in error.errors(include_url=False))
        raise RecipeError(f"{name}: {said}") from None


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    if name in bundled_recipes():
        return RECIPES / f"{name}.toml"
    if Path(name).is_file():
        return Path(name)
    raise RecipeError(f"there is no recipe {name}: name a TOML file, or one of {', '.join(bundled_recipes())}")


def read_table(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read what the file and the overrides say, not checked yet.

    Raises:
        RecipeError: the file is not TOML, or a word changes nothing.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from None
    for word in overrides:
        override(table, word)
    return table


def override(table: dict[str, Any], word: str) -> None:
    """Set one `key.path=value` in the table."""
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{word!r} changes nothing: write key=value or stage.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{word!r}: {parent} is a value and has no fields")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def complaint(kind: type, error: Any) -> str:
    """Say one of pydantic's errors in our words."""
    where = [str(part) for part in error["loc"]]
    name = ".".join(where)
    match error["type"]:
        case "missing":
            name = ".".join([*where, *fields_at(kind, where)[:1]])
            return f"{name} is missing; give it in the file, or as {name}=VALUE"
        case "unexpected_keyword_argument":
            known = fields_at(kind, where[:-1])
            close = get_close_matches(where[-1], known, n=1)
            return f"there is no field {name}; " + (f"did you mean {close[0]}?" if close else f"use {', '.join(known)}")
        case "value_error":
            return str(error["ctx"]["error"])
    return f"{name}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def fields_at(kind: type, path: Sequence[str]) -> list[str]:
    """List the fields of the dataclass that is found along this path of fields; none where there is a value."""
    named = False
    for step in path:
        if named:  # an entry of a table whose names are the user's
            named = False
            continue
        (found,) = (field.type for field in fields(kind) if field.name == step)
        options = [each for each in (found, *get_args(found)) if isinstance(each, type) and is_dataclass(each)]
        if not options:
            return []
        kind, named = options[0], get_origin(found) is dict
    return [field.name for field in fields(kind)]
