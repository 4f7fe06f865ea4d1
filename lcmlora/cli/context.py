"""What every verb is given: the project, and its settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora.project import Project

if TYPE_CHECKING:
    import typer

    from lcmlora.config import Config


@dataclass(frozen=True)
class Context:
    """The project that a command works in.

    named: whether the command line names it; else it is the current folder, which may be none.
    """

    project: Project
    named: bool = False

    @classmethod
    def of(cls, params: Path | None, folder: Path | None) -> Context:
        """Returns the context that --params and --project ask for: the folder is that of the file where it is left out.

        A file that is the folder's own params.yaml is the same as none.
        """
        root = folder if folder is not None else params.parent if params is not None else Path()
        own = params is None or params.absolute() == (root / "params.yaml").absolute()
        return cls(Project(root, None if own else params), named=params is not None or folder is not None)

    def settings(self) -> Config:
        """Returns the project's settings. Raises UserError where there are none, or they are wrong."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        return self.project.settings()

    def settings_if_any(self) -> Config | None:
        """Returns the settings; None where no project is named and the current folder is none."""
        return self.settings() if self.named or self.project.params_file.exists() else None


def context_of(call: typer.Context | Any) -> Context:
    """Returns the context of a call; that of the current folder where the verb runs outside `lcmlora`."""
    found = call.obj
    return found if isinstance(found, Context) else Context(Project())
