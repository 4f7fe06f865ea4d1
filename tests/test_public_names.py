"""The names that other programs may rely on: documented, and light until something is loaded."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import lcmlora
from lcmlora import bases, registry

# What reads or holds tensors. The others must do without torch.
WITH_TORCH = {f"lcmlora.bases.{name}" for name in ("Conditioning", "LoadedBase", "load", "pick_device", "pick_dtype")}

PUBLIC = [f"lcmlora.{name}" for name in lcmlora.__all__]
PUBLIC += [f"lcmlora.bases.{name}" for name in bases.__all__]
PUBLIC += [f"lcmlora.registry.{name}" for name in registry.__all__]

# Each statement in a process of its own, forked before anything of lcmlora is imported.
_RUN = """
import os, sys
for statement in sys.argv[1:]:
    if os.fork() == 0:
        exec(statement)
        os._exit(3 if "torch" in sys.modules else 0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def run(*statements: str) -> list[int]:
    """Returns for each statement 0, or 3 where it imports torch, or 1 where it fails."""
    command = [sys.executable, "-c", _RUN, *statements]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def test_public_names_are_imported_without_torch_where_they_need_none():
    light = [f"from lcmlora import {name}" for name in lcmlora.__all__]
    for wing in (bases, registry):
        names = [name for name in wing.__all__ if f"{wing.__name__}.{name}" not in WITH_TORCH]
        light.append(f"from {wing.__name__} import {', '.join(names)}")
    assert run(*light) == [0] * len(light)
    assert run("from lcmlora.bases import load", "from lcmlora import no_such_name") == [3, 1]


@pytest.mark.parametrize("public", PUBLIC)
def test_every_public_name_is_documented(public: str):
    module, _, name = public.rpartition(".")
    found = getattr(sys.modules[module], name)
    if isinstance(found, ModuleType) or callable(found):
        assert inspect.getdoc(found) and inspect.getdoc(found) != inspect.getdoc(type(found))
    for part in vars(found).values() if inspect.isclass(found) else ():
        if inspect.isfunction(part) and not part.__name__.startswith("_"):
            assert inspect.getdoc(part), f"{public}.{part.__name__}"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'lcmlora' has no attribute 'pipelines_of_old'"):
        getattr(lcmlora, "pipelines_of_old")  # noqa: B009
    assert {*lcmlora.__all__} <= {*dir(lcmlora)}
