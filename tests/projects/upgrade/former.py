"""A project as lcmlora 0.1.0 left it: files of 823f7d4, the last commit of that version, in tests/projects/files."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
FILES = ROOT / "tests" / "projects" / "files" / "0.1.0"  # with other names, which Git and DVC do not take for their own


def make(root: Path) -> Path:
    """Writes the project to `root`, in a new Git repository with one commit, and returns the folder."""
    root.mkdir(parents=True, exist_ok=True)
    for source in FILES.iterdir():
        name = source.name.removesuffix(".txt")
        (root / (name if name.startswith(("params", "dvc.", "prefect")) else f".{name}")).write_bytes(
            source.read_bytes()
        )
    (root / "package-lock.json").write_bytes((ROOT / "package-lock.json").read_bytes())
    git(root, "init", "-q")
    commit(root)
    return root


def commit(root: Path) -> None:
    """Commits everything in the folder."""
    git(root, "add", "-A")
    git(root, "-c", "user.name=owl", "-c", "user.email=owl@example.org", "commit", "-q", "-m", "as it was")


def git(root: Path, *arguments: str) -> str:
    """Returns what a command of Git prints."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout
