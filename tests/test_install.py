"""What is installed is what was locked, to the byte."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from lcmlora import extras
from tests.support.wheels import closure, declared, locked

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
DEVELOPERS = {"dev", "docs"}  # the extras of those who build lcmlora
LOCKS = ("requirements.lock", "bootstrap.lock", "node.lock")


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_file_has_a_digest(name: str):
    packages = locked(name)
    assert packages
    for package, (version, digests) in packages.items():
        assert re.fullmatch(r"[0-9][^ ;,*]*", version), package
        assert digests and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in digests), package


def test_npms_packages_have_digests():
    packages = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    assert all(each["integrity"].startswith("sha512-") for name, each in packages.items() if name)


def test_torch_is_fixed_but_its_build_is_the_machines():
    assert "torch" not in locked("requirements.lock")
    assert re.fullmatch(r"torch==[0-9.]+\n", (ROOT / "constraints.txt").read_text())


def test_the_lock_has_all_that_the_project_asks_for_and_what_that_asks_for():
    versions = {name: version for name, (version, _) in locked("requirements.lock").items()}
    versions["torch"] = (ROOT / "constraints.txt").read_text().split("==")[1].strip()
    # The other extras are for machines that train, and no test needs them.
    asked = closure(each for extra in ("", "pipeline", "emoji", "dev") for each in declared(extra))
    for name, requirements in asked.items():
        assert name in versions, requirements
        for requirement in requirements:
            assert requirement.specifier.contains(versions[name], prereleases=True), requirement


def test_pip_installs_no_later_version_than_a_tested_one():
    for extra in ("", *(EXTRAS - DEVELOPERS)):
        for requirement in declared(extra):
            # torchvision names the one torch that it was built for.
            bounded = any(each.operator in ("<", "==") for each in requirement.specifier)
            assert bounded or requirement.name == "torchvision", f"{extra}: {requirement}"


def test_nothing_is_installed_without_a_lock():
    lines = (ROOT / "Makefile").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line and line.startswith("\t")]
    assert len(installs) == 5
    for line in installs:
        assert (
            "--require-hashes" in line or "--constraint requirements.lock -r constraints.txt" in line or "-e ." in line
        )


def imported() -> dict[str, set[str]]:
    """Returns the packages of others that lcmlora, its tasks and its flows import, with the files that do."""
    found: dict[str, set[str]] = {}
    for wing in ("lcmlora", "tasks", "flows"):
        for path in sorted((ROOT / wing).rglob("*.py")):
            for module in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(module.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    return {name: files for name, files in found.items() if name not in {*sys.stdlib_module_names, "lcmlora"}}


def imports_of(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from imports_of(child)


@cache
def owners_of_packages() -> Mapping[str, list[str]]:
    """Returns the distributions that bring each package. It reads the files of all of them, which takes a second."""
    return importlib.metadata.packages_distributions()


@cache
def asked_by(extra: str) -> frozenset[str]:
    """Returns the distributions that an extra asks for, and those that they ask for."""
    return frozenset(closure(declared(extra)))


@cache
def brings(extra: str, package: str) -> bool:
    """Returns whether an extra's requirements, or theirs, have the package of this import name."""
    asked = asked_by(extra)
    owners = {canonicalize_name(owner) for owner in owners_of_packages().get(package, [])}
    # An extra that is not installed here names its packages as they are imported, but for open-clip-torch.
    return bool(owners & asked) or any(name.startswith(canonicalize_name(package)) for name in asked)


def test_a_missing_package_is_always_explained_by_the_extra_that_brings_it():
    known = {package: extra for extra, packages in extras.PACKAGES.items() for package in packages}
    for package, files in imported().items():
        assert brings("", package) or package in known, f"{package} stands in no extra of lcmlora/extras.py: {files}"
    for package, extra in known.items():
        assert not brings("", package), f"{package} is always installed"
        assert brings(extra, package), f"{package} does not come with lcmlora[{extra}]"


def test_the_extras_of_messages_are_those_of_pyproject():
    assert extras.PACKAGES.keys() == EXTRAS - DEVELOPERS
    for extra in extras.PACKAGES:
        asked = {str(requirement) for requirement in declared(extra)}
        for included in extras.INCLUDES.get(extra, ()):
            assert {str(requirement) for requirement in declared(included)} <= asked
