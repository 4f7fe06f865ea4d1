"""Finding the bases that people name on the command line, and those that adapters name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcmlora.adapters.layer_names import Architecture
from lcmlora.bases import architecture, fetching, folders, singlefile
from lcmlora.config import Base, Config
from lcmlora.errors import UserError
from lcmlora.project import Project
from lcmlora.registry.references import AdapterReference


@dataclass(frozen=True)
class BaseReference:
    """A base that a person named. The folder is missing if it is a base in params.yaml that was not fetched."""

    name: str
    settings: Base
    folder: Path
    sources: Path = Path()  # the folder that the settings' relative paths start in

    def architecture(self) -> Architecture:
        """Returns its layers, by its configuration."""
        return architecture.of_base(self.settings, self.folder, self.sources)


def find_base(
    name: str | None, adapter: AdapterReference, config: Config | None, project: Project, *, fetch: bool = False
) -> BaseReference | None:
    """Returns the named base, else the adapter's own. Returns None if the adapter does not name its base.

    Args:
        fetch: download the adapter's own base to the user's cache, if it is one of the hub and not in the project.
        name: a name under `bases` in params.yaml, or a diffusers folder; None for the adapter's own base.
        project: the adapter's own base may be named by a path in it.

    Raises:
        UserError: there is no such base.
    """
    if name is None:
        source = (adapter.base or {}).get("source") or ""
        if config and adapter.model in config.bases and config.bases[adapter.model].source == source:
            return _in_project(adapter.model, config, project)
        if source and (project.root / source).is_dir():
            return _at(project.root / source, adapter)
        revision = (adapter.base or {}).get("revision")
        if not fetch or not source or revision is None or singlefile.names_a_file(source):
            return None
        return _at(fetching.fetch_pinned(source, revision, (adapter.base or {}).get("variant")), adapter)
    if config and name in config.bases:
        return _in_project(name, config, project)
    if not Path(name).is_dir():
        known = f"params.yaml has {', '.join(config.bases)}" if config else "there is no params.yaml here"
        raise UserError(f"--base: {name}: no such folder and no such base; {known}")
    return _at(Path(name), adapter)


def _in_project(name: str, config: Config, project: Project) -> BaseReference:
    return BaseReference(name, config.bases[name], project.base(name), project.root)


def _at(folder: Path, adapter: AdapterReference) -> BaseReference:
    folders.check_folder(folder)
    resolution = adapter.resolution or architecture.of_folder(folder).resolution
    if resolution is None:
        raise UserError(
            f"{folder}/unet/config.json: has no sample_size, which gives the resolution; name a base of params.yaml"
        )
    base = Base(source=str(folder), resolution=resolution, variant=folders.variant(folder), license="unknown")
    return BaseReference(folder.resolve().name, base, folder)
