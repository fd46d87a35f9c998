"""The recipes that come with the package, as TOML files; `melt_serve.train.recipe_files` reads them."""

from pathlib import Path

RECIPES = Path(__file__).parent


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))
