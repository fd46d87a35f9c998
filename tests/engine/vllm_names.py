"""What another vLLM changes for us, from its Python files alone: `python -m tests.engine.vllm_names FOLDER`.

FOLDER holds that version's `vllm/`, as an unpacked wheel does; nothing of it is imported or run. Its wheel may be for
another device.
"""

import argparse
import ast
import functools
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "melt_serve" / "engine"

Function = ast.FunctionDef | ast.AsyncFunctionDef

MYPY = """\
[mypy]
check_untyped_defs = True
ignore_missing_imports = True
[mypy-vllm.*]
follow_imports = silent
[mypy-torch,torch.*,transformers.*]
follow_imports = skip
"""
"""The project's own settings skip vLLM. Here mypy reads it, and torch is left out: that would take minutes."""


def main() -> int:
    """Print what breaks and what is to be read, and return 1 if anything breaks."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.vllm_names", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that holds the other version's vllm/")
    folder = parser.parse_args().folder
    if not (folder / "vllm" / "__init__.py").is_file():
        parser.error(f"{folder} holds no vllm/: unpack a wheel of vLLM there")
    here = installed()
    broken = [*missing(folder), *sorted(type_errors(folder) - type_errors(here))]
    print(f"{len(broken)} things break:", *broken, sep="\n  ")
    changed = []
    for name in sorted({*patched(), *overridden(here)}):
        old, new = definition(here, *name), definition(folder, *name)
        if old is not None and new is not None and ast.dump(old) != ast.dump(new):
            arguments = "" if ast.dump(old.args) == ast.dump(new.args) else " (arguments, too)"
            changed.append(spelled(name) + arguments)
    print(f"\n{len(changed)} of what is patched or overridden is written otherwise; read it:", *changed, sep="\n  ")
    return 1 if broken else 0


def installed() -> Path:
    """Return the folder that holds the installed `vllm/`, without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def missing(folder: Path) -> list[str]:
    """Return what is patched and not in that folder's vLLM."""
    return [f"{spelled(name)} is patched, and gone" for name in sorted(patched()) if not definition(folder, *name)]


def patched() -> set[tuple[str, str, str]]:
    """Return module, class ("" for a function of the module) and name of all that `patches.py` replaces."""
    tree = ast.parse((ENGINE / "patches.py").read_text())
    names = imports(tree)
    found = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        loops = {
            loop.target.id: [element.id for element in loop.iter.elts if isinstance(element, ast.Name)]
            for loop in ast.walk(function)
            if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and isinstance(loop.iter, ast.Tuple)
        }
        for call in ast.walk(function):
            match call:
                case ast.Call(ast.Name("_replace"), [ast.Name(owner), ast.Constant(str(name)), _]):
                    found |= {(*names[each], name) for each in loops.get(owner, [owner])}
    return {
        (f"{module}.{owner}", "", name) if is_module(module, owner) else (module, owner, name)
        for module, owner, name in found
    }


def overridden(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield module, class and name of the methods of vLLM's classes that our engine's classes override."""
    for path in sorted(ENGINE.glob("*.py")):
        tree = ast.parse(path.read_text())
        names = imports(tree)
        for ours in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            methods = [node.name for node in ours.body if isinstance(node, Function)]
            for base in vllms_bases(ours, names):
                yield from (found for name in methods if (found := inherited(folder, *base, name)))


def vllms_bases(ours: ast.ClassDef, names: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield module and name of the classes that one of ours stands on, through others of ours."""
    for module, owner in (names[base.id] for base in ours.bases if isinstance(base, ast.Name) and base.id in names):
        if not module.startswith("melt_serve.engine."):
            yield module, owner
            continue
        tree = ast.parse((ENGINE / f"{module.rpartition('.')[2]}.py").read_text())
        between = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
        yield from vllms_bases(between, imports(tree))


def inherited(folder: Path, module: str, owner: str, name: str) -> tuple[str, str, str] | None:
    """Return where a class of vLLM has a method from: module, class and name."""
    if definition(folder, module, owner, name):
        return module, owner, name
    tree = parse(folder, module)
    if tree is None:
        return None
    names = imports(tree, module)
    if owner in names:
        return inherited(folder, *names[owner], name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != owner]
            found = (inherited(folder, *names.get(base, (module, base)), name) for base in bases)
            return next(filter(None, found), None)
    return None


def definition(folder: Path, module: str, owner: str, name: str) -> Function | None:
    """Return the function, or the class's own method, that has this name in a module of that folder's vLLM."""
    tree = parse(folder, module)
    if tree is None:
        return None
    body = tree.body
    if owner:
        names = imports(tree, module)
        if owner in names:  # a package shows what a module of it defines
            return definition(folder, *names[owner], name)
        body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner), [])
    functions = [node for node in body if isinstance(node, Function) and node.name == name]
    if not functions and not owner and (again := imports(tree, module).get(name)):
        return definition(folder, again[0], "", again[1])
    return functions[-1] if functions else None  # those before it are @overload


def type_errors(folder: Path) -> set[str]:
    """Return what mypy says of our package on that folder's vLLM, without line numbers.

    Imports, names, and the arguments of what is called and overridden; on the installed vLLM much of it is noise.
    """
    with tempfile.TemporaryDirectory() as temporary:
        (settings := Path(temporary) / "mypy.ini").write_text(MYPY)
        (packages := Path(temporary) / "packages").mkdir()
        (packages / "vllm").symlink_to((folder / "vllm").resolve())
        flags = ("--config-file", settings, "--cache-dir", Path(temporary) / "cache", "--no-site-packages")
        words = ("--explicit-package-bases", "--hide-error-context", "--no-error-summary", "melt_serve")
        run = subprocess.run(
            [sys.executable, "-m", "mypy", *map(str, flags), *words],
            env={"MYPYPATH": str(packages)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if run.returncode not in (0, 1):
        raise RuntimeError(f"mypy ended with exit code {run.returncode}: {run.stdout}{run.stderr}")
    errors = (line.split(":", 2) for line in run.stdout.splitlines() if ": error: " in line)
    return {f"{path}:{message.removeprefix(' error:')}" for path, _, message in errors}


def imports(tree: ast.Module, module: str = "") -> dict[str, tuple[str, str]]:
    """Return by name what a file imports from modules: the module, and the name there."""
    return {
        alias.asname or alias.name: (
            importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0]),
            alias.name,
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level == 0 or module)
        for alias in node.names
    }


def spelled(name: tuple[str, str, str]) -> str:
    return ".".join(filter(None, name))


def is_module(package: str, name: str) -> bool:
    return file_of(installed(), f"{package}.{name}") is not None


@functools.cache
def parse(folder: Path, module: str) -> ast.Module | None:
    path = file_of(folder, module)
    return None if path is None else ast.parse(path.read_text())


def file_of(folder: Path, module: str) -> Path | None:
    path = folder.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


if __name__ == "__main__":
    sys.exit(main())
