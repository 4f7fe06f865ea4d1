"""A service that looks adapters up: a process of its own, in a folder that is no project, with few packages.

It runs as a script. Until it draws, it finds no package that neither `pip install 'lcmlora[registry]'` nor
Python brings. What it looks up it prints as JSON.

    service.py NAME [PROMPT]       NAME as `lcmlora.load_pipeline` takes it; with a prompt it also draws
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def _names(requirements: Sequence[str]) -> set[str]:
    """Returns the distributions that requirements name, without those of extras."""
    plain = [each for each in requirements if "extra ==" not in each]
    return {_plain(re.split(r"[^A-Za-z0-9._-]", each, maxsplit=1)[0]) for each in plain}


def brought_by(extra: str) -> set[str]:
    """Returns the distributions that lcmlora and one of its extras bring, as far as they are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = _names([*project["dependencies"], *project["optional-dependencies"][extra]])
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        found.add(name)
        try:
            wanted |= _names(metadata.requires(name) or []) - found
        except metadata.PackageNotFoundError:  # of another system or Python, by its marker
            continue
    return found


class _Without(MetaPathFinder):
    """Finds what another finder finds, but for other distributions and their packages: they seem not to be installed.

    Args:
        owners: the distributions that bring each package.
    """

    def __init__(self, finder: Any, allowed: set[str], owners: Mapping[str, set[str]]) -> None:
        self._finder, self._allowed, self._owners = finder, allowed, owners

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        owners = self._owners.get(fullname.partition(".")[0])
        if owners and not owners & self._allowed:
            return None
        spec: ModuleSpec | None = self._finder.find_spec(fullname, path, target)
        return spec

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        """As importlib.metadata asks finders."""
        find = getattr(self._finder, "find_distributions", lambda _: ())
        return (found for found in find(context) if _plain(found.metadata["Name"]) in self._allowed)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def main(name: str, prompt: str | None = None) -> None:
    finders = list(sys.meta_path)
    allowed = brought_by("registry") | {"lcmlora"}
    owners = {package: set(map(_plain, names)) for package, names in metadata.packages_distributions().items()}
    sys.meta_path[:] = [_Without(finder, allowed, owners) for finder in finders]
    import lcmlora
    from lcmlora import registry
    from lcmlora.registry.references import Places, open_adapter

    version = registry.resolve(name)
    folder = registry.pull(name)
    assert open_adapter(name, Places.of_environment()).weights.parent == folder
    found = {
        "reference": version.reference,
        "sha256": version.sha256,
        "folder": str(folder),
        "files": sorted(path.name for path in folder.iterdir()),
        "verified": registry.verify(folder).reference,
        "imported": sorted({"torch", "prefect", "dvc", "diffusers", "pandas", "sqlalchemy"} & set(sys.modules)),
        "refused": _is_refused("torch"),
    }
    if prompt is not None:
        sys.meta_path[:] = finders
        (picture,) = lcmlora.load_pipeline(name, "cpu")(prompt, steps=2, seed=3)
        found["picture"] = hashlib.sha256(picture.tobytes()).hexdigest()
    print(json.dumps(found))


def _is_refused(package: str) -> bool:
    try:
        __import__(package)
    except ModuleNotFoundError:
        return True
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
