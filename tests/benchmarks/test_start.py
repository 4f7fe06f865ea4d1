"""Every benchmark starts. What it measures takes minutes, so this is all that an ordinary test run can hold."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import pytest

import benchmarks

_NO_COMMANDS = {
    "choosing",
    "costs",
    "memory",
    "origins",
    "preparation",
    "published",
    "reference",
    "tables",
}  # parts of others
COMMANDS = sorted({module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - _NO_COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{name}" in " ".join(capsys.readouterr().out.split())
