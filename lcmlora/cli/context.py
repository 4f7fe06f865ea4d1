"""The context of every verb: the project and its settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora.project import Project

if TYPE_CHECKING:
    import typer

    from lcmlora.config import Config
    from lcmlora.registry.references import Places


@dataclass(frozen=True)
class Context:
    """The project that a command works in.

    named: whether the command line names it. Otherwise it is the current folder, which need not be a project.
    """

    project: Project
    named: bool = False

    @classmethod
    def of(cls, params: Path | None, folder: Path | None) -> Context:
        """Returns the context of --params and --project. Without --project, the folder is that of --params.

        Naming the folder's own params.yaml is the same as naming no file.
        """
        root = folder if folder is not None else params.parent if params is not None else Path()
        own = params is None or params.absolute() == (root / "params.yaml").absolute()
        return cls(Project(root, None if own else params), named=params is not None or folder is not None)

    def settings(self) -> Config:
        """Returns the project's settings. Raises UserError where params.yaml is missing or wrong."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        return self.project.settings()

    def settings_if_any(self) -> Config | None:
        """Returns the settings, None if no project is named and the current folder is no project."""
        return self.settings() if self.named or self.project.params_file.exists() else None

    def places(self, config: Config | None) -> Places:
        """Returns where adapters are looked for: as these settings say, or the environment outside a project."""
        from lcmlora.registry.references import Places

        return Places.of_environment() if config is None else Places.of_project(self.project, config)


def context_of(call: typer.Context | Any) -> Context:
    """Returns the context of a call, that of the current folder if the verb runs outside `lcmlora`."""
    return call.obj if isinstance(call.obj, Context) else Context(Project())
