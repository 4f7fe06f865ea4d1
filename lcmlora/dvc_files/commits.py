"""Commits of Git: that of a project, and that of this package where it is run from a repository."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import lcmlora
from lcmlora.io.documents import Document

# Results that the pipeline itself writes, which do not make the code dirty.
_RESULTS = ("dvc.lock", "resolved.yaml", "metrics", "plots", "compatibility")


class Commit(Document):
    """The code's commit, and whether tracked files differed from it; None outside a repository."""

    commit: str | None
    dirty: bool | None

    @property
    def text(self) -> str:
        """The first digits, with `and changes` where tracked files differed."""
        return (self.commit or "no commit")[:12] + (" and changes" if self.dirty else "")


def of_project(root: Path) -> Commit:
    """Returns the commit of the project's repository. Results of the pipeline do not make it dirty."""
    return _commit(root, [".", *(f":(exclude){name}" for name in _RESULTS)])


def first_of_project(root: Path) -> str | None:
    """Returns the first commit of the project's history, which all of its clones share. None where it is not known:
    there is no commit yet, or the clone is shallow."""
    if _output(root, "rev-parse", "--is-shallow-repository") != "false":
        return None
    first = _output(root, "rev-list", "--max-parents=0", "HEAD")
    return min(first.split()) if first else None


def of_package() -> Commit:
    """Returns the commit of the repository that this package is run from; none where it is installed."""
    folder = Path(lcmlora.__file__).resolve().parent
    # A virtual environment may lie in another repository, which does not have its files.
    if _output(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return Commit(commit=None, dirty=None)
    return _commit(folder, [".", "../flows", "../tasks"])


def _commit(folder: Path, paths: list[str]) -> Commit:
    changes = _output(folder, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    commit = _output(folder, "rev-parse", "--verify", "HEAD")
    return Commit(commit=commit, dirty=None if commit is None or changes is None else bool(changes))


def _output(folder: Path, *arguments: str) -> str | None:
    """Returns the output of a Git command, None where there is no Git or no repository."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # a person may be committing
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
