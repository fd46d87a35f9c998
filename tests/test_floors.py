"""Which part of the house may import which (docs/architecture.md, "Floors"), read off the import statements."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("melt_serve", "loadtests", "deploy", "examples")

TOOLS = "tools"
"""The room of the files that lie loose in `melt_serve/` and are not named below."""

STANDS_ON = {
    "config": "",
    "answers": "",
    "tools": "answers config",
    "kernels": "",
    "modeling": "config",
    "engine": "answers config kernels vllm",
    "task": "answers config modeling tools",
    "convert": "answers config modeling tools",
    "serve": "answers tools",
    "demo": "config serve task tools",
    "chat": "tools",
    "commands": "chat config convert task tools",
    "train": "answers config convert kernels modeling task tools",
    "api": "config engine vllm",
    "bench": "config engine kernels modeling task tools vllm",
    "bench.layers": "config engine kernels modeling task tools train vllm",  # measures a training step, too
    "bench.reference": "config kernels modeling tools train",  # runs training's model, the one with the kernels
    "verify": "answers bench config modeling task tools",
    "cli": "api bench chat commands config convert demo engine kernels modeling serve task tools train verify",
    "loadtests": "config task tools",
    "deploy": "task tools",
    "examples": "cli modeling task tools",
}
"""A room, and what it may import besides its own folder, lazily or not: rooms, and vLLM."""

BANNED_NAMES = {"base", "common", "helpers", "misc", "util", "utils"}


@dataclass(frozen=True)
class Import:
    """An import statement: which module imports which, where, and whether it stands outside of functions."""

    importer: str
    imported: str
    names: tuple[str, ...]
    line: int
    at_once: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def statements(node: ast.AST, at_once: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, at_once and not function)


def imports_of(importer: str, source: str) -> Iterator[Import]:
    package = importer if FILES[importer].name == "__init__.py" else importer.rpartition(".")[0]
    for node, at_once in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, (), node.lineno, at_once)
            continue
        origin = resolve_name("." * node.level + (node.module or ""), package)
        modules = {alias.name for alias in node.names if f"{origin}.{alias.name}" in FILES}
        for name in sorted(modules):
            yield Import(importer, f"{origin}.{name}", (), node.lineno, at_once)
        if others := tuple(alias.name for alias in node.names if alias.name not in modules):
            yield Import(importer, origin, others, node.lineno, at_once)


IMPORTS = [each for module, path in FILES.items() for each in imports_of(module, path.read_text())]


def place_of(each: Import) -> str:
    return f"{FILES[each.importer].relative_to(ROOT)}:{each.line}: imports {each.imported}"


def room_of(module: str) -> str | None:
    """Return the part of the house that a module belongs to, `vllm` for vLLM's; None for all others'."""
    if module == "melt_serve" or module.split(".")[0] not in (*PACKAGES, "vllm"):
        return None
    parts = module.removeprefix("melt_serve.").split(".")
    rooms = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((room for room in rooms if room in STANDS_ON), "vllm" if parts[0] == "vllm" else TOOLS)


def breach_of(each: Import) -> str | None:
    """Return the file, the line and the rule that an import breaks, as a line to print; None if it breaks none."""
    importer, imported = room_of(each.importer), room_of(each.imported)
    assert importer is not None
    allowed = STANDS_ON[importer].split()
    if imported is None or imported in allowed or imported.split(".")[0] == importer.split(".")[0]:
        return None
    return f"{place_of(each)}, but {importer} stands on {', '.join(allowed) or 'nothing of ours'}"


def circle_in(imports: list[Import]) -> str | None:
    """Return the statements by which modules import each other in a circle, one a line; None if there is none."""
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for each in imports:
        if each.at_once and each.imported in FILES:
            graph[each.importer].add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        steps = set(zip(error.args[1][1:], error.args[1], strict=False))
        return "\n".join(place_of(each) for each in imports if each.at_once and (each.importer, each.imported) in steps)
    return None


def test_every_part_imports_only_what_it_stands_on():
    breaches = [breach for each in IMPORTS if (breach := breach_of(each))]
    assert not breaches, "\n".join(["", *breaches])


def test_no_floor_hangs_in_the_air():
    folders = {path.name for path in (ROOT / "melt_serve").iterdir() if any(path.glob("*.py"))}
    assert folders <= STANDS_ON.keys(), "say in STANDS_ON and in docs/architecture.md what a new folder stands on"
    rooms = {room: [other for other in on.split() if other != "vllm"] for room, on in STANDS_ON.items()}
    assert list(TopologicalSorter(rooms).static_order())


def test_the_architecture_page_says_the_same():
    page = (ROOT / "docs" / "architecture.md").read_text()
    stated = dict(re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]+) \|$", page.split("## Floors")[1], re.MULTILINE))
    rooms = {room: on or "nothing" for room, on in STANDS_ON.items()}
    assert {room: on for room, on in stated.items() if room in rooms} == rooms


def test_no_modules_import_each_other_in_a_circle():
    circle = circle_in(IMPORTS)
    assert circle is None, f"a circle of imports:\n{circle}"


def test_a_circle_is_found():
    step, scheduler = "melt_serve.engine.step", "melt_serve.engine.scheduler"
    here = list(imports_of(step, f"from {scheduler} import ChunkGridScheduler"))
    back = list(imports_of(scheduler, f"\nfrom {step} import StepRows"))
    later = list(imports_of(scheduler, f"def late():\n    from {step} import StepRows"))
    assert circle_in([*here, *later]) is None
    found = circle_in([*here, *back])
    assert found is not None and set(found.splitlines()) == {
        f"melt_serve/engine/step.py:1: imports {scheduler}",
        f"melt_serve/engine/scheduler.py:2: imports {step}",
    }


def test_no_module_imports_another_ones_private_names():
    private = [
        f"{place_of(each)}.{name}, which is private to that module"
        for each in IMPORTS
        for name in each.names
        if each.imported in FILES and name.startswith("_")
    ]
    assert not private, "\n".join(["", *private])


def test_no_file_is_named_after_nothing():
    """A helper lives beside its only user; with two it gets a name of its own."""
    named = [path for path in FILES.values() if BANNED_NAMES & {path.stem, *path.relative_to(ROOT).parts[:-1]}]
    assert not [f"{path.relative_to(ROOT)}: say what it holds" for path in named]


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("melt_serve.config", "from melt_serve.terminal import fail"),
        ("melt_serve.kernels.gate", "import vllm"),
        ("melt_serve.kernels.gate", "from melt_serve.modeling import gate"),
        ("melt_serve.modeling.melt", "from vllm.config import VllmConfig"),
        ("melt_serve.modeling.melt", "from melt_serve.engine.depth import Depth"),
        ("melt_serve.engine.melt", "from melt_serve.modeling.gate import KVGate"),
        ("melt_serve.engine.melt", "from ..modeling import gate"),
        ("melt_serve.engine.usage", "from melt_serve.api.metrics import gauge"),
        ("melt_serve.train.run", "import melt_serve.engine.depth"),
        ("melt_serve.train.run", "from vllm import LLM"),
        ("melt_serve.train.cost.plan", "from melt_serve.bench import shapes"),
        ("melt_serve.task.evaluate", "from melt_serve.train import results"),
        ("melt_serve.bench.throughput", "from melt_serve.train.distil.student import Student"),
        ("melt_serve.api.info", "import melt_serve.train"),
        ("melt_serve.device", "from melt_serve.bench import engine"),
        ("loadtests.users", "from melt_serve.train import recipe"),
    ],
)
@pytest.mark.parametrize("place", ["{}", "def late():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_broken_rule_is_found_wherever_the_import_stands(importer, statement, place):
    source = place.format(statement)
    (breach,) = [breach for each in imports_of(importer, source) if (breach := breach_of(each))]
    file = FILES[importer].relative_to(ROOT).as_posix()
    assert breach.startswith(f"{file}:{len(source.splitlines())}: imports ") and "stands on" in breach


IMPORT_WITHOUT_VLLM = """
import importlib, sys

sys.modules["vllm"] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_what_does_not_stand_on_vllm_imports_without_it():
    modules = [
        module
        for module in FILES
        if module.startswith("melt_serve.") and "vllm" not in STANDS_ON[room_of(module) or ""].split()
    ]
    assert {"melt_serve.modeling.melt", "melt_serve.train.run", "melt_serve.cli"} <= set(modules)
    run = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_VLLM, *modules], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
