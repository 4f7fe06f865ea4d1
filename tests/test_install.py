"""What is installed is what was locked, to the byte."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "bootstrap.lock", "node.lock")


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Returns a lock's packages with their versions and digests."""
    found = {}
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    for entry in re.split(r"\n(?=\S)", "\n".join(lines).strip()):
        pin, *digests = (part.rstrip("\\").strip() for part in entry.splitlines())
        package, version = pin.split("==")
        found[package] = (version, digests)
    return found


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The others are for machines that train, and no test needs them.
    asked = [*project["dependencies"], *extras["pipeline"], *extras["emoji"], *extras["dev"]]
    versions = {name: version for name, (version, _) in locked("requirements.lock").items()}
    versions["torch"] = (ROOT / "constraints.txt").read_text().split("==")[1].strip()
    requirements = [Requirement(each) for each in asked]
    seen: set[str] = set()
    while requirements:
        requirement = requirements.pop()
        name = canonicalize_name(requirement.name)
        assert name in versions, requirement
        assert requirement.specifier.contains(versions[name], prereleases=True), requirement
        if name in seen or name == "torch":  # which brings what its build needs
            continue
        seen.add(name)
        for text in importlib.metadata.requires(name) or []:
            further = Requirement(text)
            if not further.marker or further.marker.evaluate({"extra": ""}):
                requirements.append(further)


def test_nothing_is_installed_without_a_lock():
    lines = (ROOT / "Makefile").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line and line.startswith("\t")]
    assert len(installs) == 5
    for line in installs:
        assert (
            "--require-hashes" in line or "--constraint requirements.lock -r constraints.txt" in line or "-e ." in line
        )
