"""resolved.yaml: the settings and versions that decide every stage of a project, which DVC reads as parameters.

It is written by `lcmlora resolve` from params.yaml and this package, and committed. `dvc repro` runs that first; the
flow, and verbs that are called by hand, do the same. A verb that DVC calls refuses to run where it is out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lcmlora import stages
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.io import temporaries
from lcmlora.io.files import atomic_write
from lcmlora.io.parsing import JsonObject, read_yaml
from lcmlora.io.terminal import note
from lcmlora.stages import Run, Settings

_HEADER = """\
# Written by `lcmlora resolve`; do not edit. What decides the result of each stage: its settings, as params.yaml and the
# defaults give them, and the versions of its algorithms (lcmlora/stages.py).
"""


def resolve(config: Config) -> JsonObject:
    """Returns the content of resolved.yaml.

    Raises:
        UserError: two names would share one entry.
    """
    tree: JsonObject = {}
    for run in stages.runs(config):
        _put(tree, run, _entry(config, run))
    return tree


def text(config: Config) -> str:
    """Returns the text of resolved.yaml. Raises UserError as `resolve` does."""
    return _text(resolve(config))


def is_current(config: Config, path: Path) -> bool:
    """Returns whether the file holds what `resolve` returns."""
    return path.is_file() and path.read_text(encoding="utf-8") == text(config)


def refresh(config: Config, path: Path) -> bool:
    """Brings the file up to date and returns whether that changed it."""
    tree = resolve(config)
    with temporaries.locked(path):
        if path.is_file() and path.read_text(encoding="utf-8") == _text(tree):
            return False
        _write(tree, path)
        return True


@contextmanager
def running(config: Config, run: Run, path: Path) -> Iterator[None]:
    """Encloses a stage's work, so that DVC records the settings that it ran with and no others.

    If a person calls the stage in a project that has the file, the file is brought up to date. If DVC calls, it must be
    up to date. DVC reads it again when the stage has ended: if it was changed meanwhile, the settings of this run are
    put back, and the change makes the stage stale from the next refresh on.

    Raises:
        UserError: DVC calls, and the file is missing or out of date for this run.
    """
    if "DVC_STAGE" not in os.environ:
        if path.is_file() and refresh(config, path):
            note(f"{path}: is up to date now")
        yield
        return
    entry = _entry(config, run)
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `lcmlora resolve`, then dvc repro again")
    if _get(read_yaml(path), run) != entry:
        raise UserError(
            f"{path}: {entry_name(run)}: is not what params.yaml and this version of lcmlora say; run "
            "`lcmlora resolve`, then dvc repro again"
        )
    yield
    with temporaries.locked(path):
        tree = read_yaml(path)
        if _get(tree, run) != entry:
            _put(tree, run, entry)
            _write(tree, path)
            note(f"{path}: was changed while the stage ran; what changed counts from the next run on", "warning: ")


def _entry(config: Config, run: Run) -> Settings:
    return {"algorithms": stages.algorithms(run.stage)} | stages.decisive_settings(config, run)


def digest(config: Config, run: Run) -> str:
    """Returns the SHA-256 of all that decides a run's result besides its inputs: its entry in resolved.yaml."""
    return hashlib.sha256(json.dumps(_entry(config, run), sort_keys=True).encode()).hexdigest()


def entry_name(run: Run) -> str:
    """Returns the key of a run's entry, as dvc.yaml names it: models.emoji.distill."""
    return ".".join(_keys(run))


def _keys(run: Run) -> list[str]:
    """Returns the keys of a run's entry: its names, divided at the dots, as DVC divides the keys in dvc.yaml."""
    names = ["models", *run.model.split(".")] if run.model is not None else []
    if run.name is not None:
        names += ["variations", *run.name.split(".")]
    return [*names, run.stage]


def _get(tree: Any, run: Run) -> Any:
    for key in _keys(run):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _put(tree: JsonObject, run: Run, entry: Settings) -> None:
    *above, last = _keys(run)
    for depth, key in enumerate(above):
        tree = tree.setdefault(key, {})
        if "algorithms" in tree:
            raise _ambiguous_name(above[: depth + 1])
    if "algorithms" not in tree.setdefault(last, entry):
        raise _ambiguous_name([*above, last])
    tree[last] = entry


def _ambiguous_name(keys: list[str]) -> UserError:
    entry = ".".join(keys)
    return UserError(
        f"{entry}: one name ends in `.{keys[-1]}`, where resolved.yaml has a stage's settings; use another name"
    )


def _text(tree: JsonObject) -> str:
    return _HEADER + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _write(tree: JsonObject, path: Path) -> None:
    atomic_write(path, lambda part: part.write_text(_text(tree), encoding="utf-8"))


class _Dumper(yaml.SafeDumper):
    """Lists in a line, everything else in lines of its own."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))
