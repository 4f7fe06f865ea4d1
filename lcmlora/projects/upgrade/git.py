"""What an upgrade asks Git: whether files can be brought back, how they were generated, and to merge edits."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io.files import temporary_folder
from lcmlora.io.terminal import joined

_COMMITS = 100  # that a generated text is looked for in


def check_clean(root: Path, paths: Sequence[str]) -> None:
    """Raises UserError if one of these files, relative to `root`, has changes that Git does not have."""
    found = _git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--", *paths)
    if found.returncode != 0:
        raise UserError(
            f"{root}: {joined(found.stderr)}; an upgrade rewrites files, and Git is what brings the former ones back"
        )
    if changed := [entry[3:] for entry in found.stdout.split("\0") if entry]:
        raise UserError(
            f"{', '.join(changed)}: with changes that Git does not have, and an upgrade would overwrite them; commit "
            "or stash them first"
        )


def find(root: Path, path: str, wanted: Callable[[str], bool]) -> str | None:
    """Returns the text of a file in the newest commit where it is the wanted one; None where there is none."""
    listed = _git(root, "log", f"--max-count={_COMMITS}", "--format=%H", "--", path)
    for commit in listed.stdout.split() if listed.returncode == 0 else ():
        shown = _git(root, "show", f"{commit}:./{path}")
        if shown.returncode == 0 and wanted(shown.stdout):
            return shown.stdout
    return None


def merged(own: str, base: str, new: str) -> str | None:
    """Returns `own` with the changes that lead from `base` to `new`; None if the two contradict each other."""
    with temporary_folder() as folder:
        for name, text in (("own", own), ("base", base), ("new", new)):
            (folder / name).write_text(text, encoding="utf-8")
        found = _git(folder, "merge-file", "-p", "own", "base", "new")
    return found.stdout if found.returncode == 0 else None


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Git in a folder. Raises UserError if there is no Git."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise UserError("git: no such program; an upgrade needs it to bring former files back") from None
