"""Bases with mutated files: each is refused in one line, or loads."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lcmlora import bases
from tests.support.base_changes import (
    settings_of,
    split_vocabulary,
)
from tests.support.fuzzing import FULL, QUICK, check, mutated

Miniatures = Callable[[str], Path]


def _inputs(folder: Path, count: int) -> Iterator[bytes]:
    """Yields the name of a file of the base, a zero byte and the mutated content; only the name if it is removed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        name = path.relative_to(folder).as_posix().encode()
        content = path.read_bytes()
        words = (b'"vocab"', b"F16", b"F8_E4M3", b"[0,0]", b"null", b"1e400", b"[]", b"UNet2DConditionModel")
        if number % 50 == 49:
            yield name
        else:
            # A change in the weights themselves is a number like any other, and the header decides.
            reach = content[:20_000] if path.suffix == ".safetensors" else content
            (changed,) = mutated([reach], 1, number, words)
            yield name + b"\0" + changed + content[len(reach) :]


def _use(content: bytes) -> None:
    """Loads the base with the file that an input replaces or removes."""
    name, there, changed = content.partition(b"\0")
    folder = Path(os.environ["LCMLORA_FUZZED_BASE"])
    copy = folder.with_name(f"copy-{os.getpid()}")
    shutil.rmtree(copy, ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.relative_to(folder).as_posix().encode() != name:
                target.symlink_to(path)
            elif there:
                target.write_bytes(changed)
    base = bases.load("mine", settings_of(copy), copy, device=torch.device("cpu"))
    base.encode_text(["red apple", ""])


@pytest.mark.parametrize("count", [QUICK, pytest.param(FULL, marks=pytest.mark.slow)])
def test_a_mutated_base_is_refused_in_one_line_or_loads(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    plain = shutil.copytree(base_folder, tmp_path / "plain")
    split_vocabulary(plain)
    whole = shutil.copytree(base_folder, tmp_path / "whole")
    for folder in (plain, whole):
        monkeypatch.setenv("LCMLORA_FUZZED_BASE", str(folder))
        counts = check(_use, _inputs(folder, count // 2), memory=8 << 30)
        assert counts["refused"] > count // 8
