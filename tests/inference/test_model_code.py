"""The copy of the package in an MLflow model has what drawing needs, and no more."""

import ast
from collections.abc import Iterator
from pathlib import Path

from lcmlora.inference import serving

ROOT = Path(__file__).parents[2]


def imports(path: Path) -> Iterator[str]:
    """Yields what a file imports of the package, in functions, too, but not for types alone."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("lcmlora"):
                yield from (str(child.module), *(f"{child.module}.{alias.name}" for alias in child.names))
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names if alias.name.startswith("lcmlora."))
            yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def test_nothing_that_drawing_imports_is_left_out():
    waiting, seen = [ROOT / "lcmlora/inference" / serving.SCRIPT], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(path):
            place = ROOT.joinpath(*module.split("."))
            waiting += [each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file()]
    wings = {path.relative_to(ROOT / "lcmlora").parts[0] for path in seen}
    assert {"bases", "diffusion", "inference", "releases"} <= wings
    assert not wings & {*serving.LEFT_OUT, *(f"{wing}.py" for wing in serving.LEFT_OUT)}


def test_the_copy_has_code_alone_and_lacks_wings_that_only_stages_and_people_need():
    folder = ROOT / "lcmlora"
    left_out = serving._not_code(str(folder), [path.name for path in folder.iterdir()])
    assert set(serving.LEFT_OUT) | {"templates"} <= left_out
    assert not {"inference", "releases", "__init__.py", "architectures.json", "py.typed"} & left_out
