"""The wheel of this checkout, and fresh environments that have it and, of the locked packages, what it asks for.

Packages come from where `make install` takes them, and their digests are checked as there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")


def locked(name: str = "requirements.lock") -> dict[str, tuple[str, list[str]]]:
    """Returns a lock's packages with their versions and digests."""
    found = {}
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    for entry in re.split(r"\n(?=\S)", "\n".join(lines).strip()):
        pin, *digests = (part.rstrip("\\").strip() for part in entry.splitlines())
        package, version = pin.split("==")
        found[package] = (version, digests)
    return found


@cache
def declared(extra: str = "") -> tuple[Requirement, ...]:
    """Returns the requirements of an extra and of the extras in it; without an extra, those of the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: list[Requirement] = []
    for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        requirement = Requirement(text)
        if requirement.name == "lcmlora":
            found += [each for inner in sorted(requirement.extras) for each in declared(inner)]
        else:
            found.append(requirement)
    return tuple(found)


def closure(requirements: Iterable[Requirement]) -> dict[str, list[Requirement]]:
    """Returns the packages that these and their own requirements ask for, each with all that asks for it.

    torch's own requirements are left out: they are those of its build.
    """
    found: dict[str, list[Requirement]] = {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        known = name in found
        found.setdefault(name, []).append(requirement)
        if known or name == "torch":
            continue
        waiting += _asked_by(name)
    return found


@cache
def _asked_by(name: str) -> tuple[Requirement, ...]:
    """Returns what a distribution asks for; nothing if it is of an extra that this environment does not have."""
    try:
        return tuple(map(Requirement, importlib.metadata.requires(name) or []))
    except importlib.metadata.PackageNotFoundError:
        return ()


def build(work: Path) -> tuple[Path, Path, Path]:
    """Builds in a copy of the checkout, and returns the sdist, the wheel that is made from it, and the wheel that is
    made from the copy itself."""
    source = _copied(work / "source")
    _build(source, work / "from-sdist")
    _build(source, work / "direct", "--wheel")
    (sdist,), (wheel,) = (work / "from-sdist").glob("*.tar.gz"), (work / "from-sdist").glob("*.whl")
    (direct,) = (work / "direct").glob("*.whl")
    return sdist, wheel, direct


def build_wheel(work: Path) -> Path:
    """Builds in a copy of the checkout, and returns the wheel."""
    _build(_copied(work / "source"), work, "--wheel")
    (wheel,) = work.glob("*.whl")
    return wheel


def _build(source: Path, out: Path, *kinds: str) -> None:
    options = ("--quiet", "--no-build-isolation", "--python", sys.executable)
    _uv("build", *options, *kinds, "--out-dir", str(out), str(source))


def _copied(source: Path) -> Path:
    """Copies the checkout to a folder, and returns it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    return source


class Environment:
    """A virtual environment with the wheel."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.python = folder / "bin/python"
        _uv("venv", "--quiet", "--python", sys.executable, str(folder))
        self._install("--no-deps", str(wheel))

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def add(self, *extras: str) -> None:
        """Installs what the package and these extras ask for, in the locked versions."""
        names = closure(each for extra in ("", *extras) for each in declared(extra))
        pins = locked()
        lines = [f"{name}=={pins[name][0]} {' '.join(pins[name][1])}" for name in sorted(names)]
        lock = self.folder / "requirements.lock"
        lock.write_text("\n".join(lines) + "\n")
        self._install("--no-deps", "--require-hashes", "-r", str(lock))
        _uv("pip", "check", "--quiet", "--python", str(self.python))

    def add_all(self) -> None:
        """Makes all packages of the tests' own environment importable, but for its lcmlora, which comes after the
        wheel."""
        paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (self.packages / "tests.pth").write_text("".join(f"{path}\n" for path in paths))

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, such as `lcmlora` or `python`, and returns how it ended."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{inherited['PATH']}"
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=cwd, env=inherited | {"PATH": path} | variables, capture_output=True, text=True
        )

    def _install(self, *arguments: str) -> None:
        _uv("pip", "install", "--quiet", "--python", str(self.python), *arguments)


def _uv(*arguments: str) -> None:
    links = os.environ.get("PIP_FIND_LINKS")
    done = subprocess.run(
        [str(UV), *arguments],
        env=os.environ | ({"UV_FIND_LINKS": links} if links else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
