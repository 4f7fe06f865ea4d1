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
WITH_TORCH = {
    f"lcmlora.bases.{name}" for name in ("Conditioning", "LoadedBase", "load", "pick_device", "pick_dtype")
} | {"lcmlora.bases.network_forward", "lcmlora.bases.unet_forward"}

PUBLIC = [f"lcmlora.{name}" for name in lcmlora.__all__]
PUBLIC += [f"lcmlora.bases.{name}" for name in bases.__all__]
PUBLIC += [f"lcmlora.registry.{name}" for name in registry.__all__]

# Each in a process of its own, forked before anything of lcmlora is imported.
_IMPORT = """
import os, sys
for public in sys.argv[1:]:
    if os.fork() == 0:
        module, _, name = public.rpartition(".")
        exec(f"from {module} import {name}")
        os._exit(3 if "torch" in sys.modules else 0)
    print(public, os.waitstatus_to_exitcode(os.wait()[1]))
"""


def imported(*names: str) -> dict[str, int]:
    """Returns for each name 0, or 3 where importing it imports torch, or 1 where it cannot be imported."""
    told = subprocess.run([sys.executable, "-c", _IMPORT, *names], capture_output=True, text=True, check=True).stdout
    return {name: int(status) for name, status in (line.split() for line in told.splitlines())}


def test_public_names_are_imported_without_torch_where_they_need_none():
    light = [name for name in PUBLIC if name not in WITH_TORCH]
    assert imported(*light) == dict.fromkeys(light, 0)
    assert imported("lcmlora.bases.load", "lcmlora.no_such_name") == {
        "lcmlora.bases.load": 3,
        "lcmlora.no_such_name": 1,
    }


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
