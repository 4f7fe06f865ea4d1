"""The order of the wings: what may import what, held against every import of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lcmlora"

# From the lowest to the highest: a module imports from its own line and from those above it. Wings on one line do not
# import each other. A name without a folder is a module of the top level.
WINGS = (
    ("masking",),
    ("errors",),
    ("extras",),
    ("io",),
    ("names", "plugins", "progress", "templates"),
    ("settings",),
    ("config",),
    ("project", "stages"),
    ("dvc_files",),
    ("patches",),
    ("adapters",),
    ("bases",),
    ("diffusion",),
    ("parallel",),
    ("data",),
    ("training",),
    ("distillation", "evaluation"),
    ("doctor",),
    ("releases",),
    ("inference",),
    ("registry",),
    ("demo",),
    ("projects",),
    ("cli",),
    ("tasks",),
    ("flows",),
)
FLOOR = {wing: number for number, line in enumerate(WINGS) for wing in line}
MOST = 9  # modules of a folder, without its __init__.py
LONGEST = 500  # lines of a module


def _modules() -> list[Path]:
    folders = (PACKAGE, PACKAGE / "tasks", PACKAGE / "flows")  # the last two are links, which rglob does not follow
    found = {path for folder in folders for path in folder.rglob("*.py")}
    return sorted(path for path in found if path.name not in ("__init__.py", "__main__.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _wing(module: str) -> str:
    return module.split(".")[1]


@cache
def _imports(path: Path) -> tuple[tuple[str, int, bool], ...]:
    """Returns what a file imports of the package: module, line, and whether this happens when it is imported itself."""
    return tuple(_walk(ast.parse(path.read_text(encoding="utf-8")), at_import=True))


def _walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "lcmlora":
            for alias in child.names:
                yield _resolved(f"{child.module}.{alias.name}"), child.lineno, at_import
        elif isinstance(child, ast.Import):
            for alias in child.names:
                if alias.name.split(".")[0] == "lcmlora":
                    yield _resolved(alias.name), child.lineno, at_import
        elif not _runs_as_a_command(child):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_for_types(child)
            yield from _walk(child, at_import and not inside)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _runs_as_a_command(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _resolved(dotted: str) -> str:
    """Returns the module or package that the name is, or is defined in."""
    place = ROOT.joinpath(*dotted.split("."))
    return dotted if place.is_dir() or place.with_suffix(".py").exists() else dotted.rpartition(".")[0]


def test_every_wing_has_its_place_in_the_order():
    found = {_wing(_name(path)) for path in _modules()}
    assert found <= FLOOR.keys(), f"WINGS lacks {sorted(found - FLOOR.keys())}"


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_a_module_imports_nothing_from_a_later_wing(path: Path):
    mine = _wing(_name(path))
    wrong = [
        f"line {line}: {module}"
        for module, line, _ in _imports(path)
        if module != "lcmlora" and _wing(module) != mine and FLOOR[_wing(module)] >= FLOOR[mine]
    ]
    assert not wrong, f"{_name(path)} ({mine}) imports from wings that come after it or stand beside it: {wrong}"


def test_no_import_leads_in_a_circle():
    graph = {_name(path): {m for m, _, _ in _imports(path) if m != _name(path)} for path in _modules()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for following in sorted(graph.get(module, ())):
                visit(following, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_folder_has_more_modules_than_a_reader_takes_in():
    folders = {path.parent for path in _modules() if not path.parent.is_symlink()}
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in sorted(folders)
        if (count := sum(path.parent == folder for path in _modules())) > MOST
    }
    assert not crowded


def test_no_module_is_too_long_to_be_read_at_once():
    lengths = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in _modules()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


@pytest.mark.parametrize("folder", ["tasks", "flows"])
def test_tasks_and_flows_lie_at_the_top_and_belong_to_the_package_and_know_no_torch(folder: str):
    assert (PACKAGE / folder).readlink() == Path("..", folder)
    for path in sorted((ROOT / folder).glob("*.py")):
        assert "import torch" not in path.read_text() and "from torch" not in path.read_text(), path
