"""Loading an adapter by its name, ready to draw: from the registry, a store, the hub, a project, a folder or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora import extras
from lcmlora.config import Registry
from lcmlora.io.private import downloads
from lcmlora.project import Project
from lcmlora.registry.references import Places, open_adapter
from lcmlora.releases import bundle

if TYPE_CHECKING:
    from lcmlora.inference.pipelines import Drawer


def load_pipeline(
    reference: str | Path,
    device: str = "auto",
    *,
    project: Path | str | None = None,
    settings: Registry | None = None,
    base: Path | str | None = None,
    cache: Path | None = None,
    controlnet: Path | None = None,
) -> Drawer:
    """Returns a pipeline that draws with an adapter, on the base that it was made for and with its sampler.

    No project is needed: MLFLOW_TRACKING_URI says where the registry is, and LCMLORA_PUBLISH_TO where releases are
    published. Adapter and base are downloaded once, to $LCMLORA_CACHE or the user's cache, and every file is checked.
    Any number of processes may do so at a time. With LCMLORA_OFFLINE=1 no registry is asked.

    Args:
        reference: `sdxl@champion`, `sdxl/3`, `models:/NAME@ALIAS`, digits of a SHA-256, `s3://...`, a hub id, a folder,
            a .safetensors file in any spelling, or a model of the project (see `references`).
        device: auto, cpu or cuda.
        project: the folder of a project. Its params.yaml names the registry and the store, and relative paths of bases
            start there. By default the current folder, if it is a project, else none.
        settings: of the registry, in place of the project's and the environment's.
        base: the folder of the base; by default the one that the adapter names: a folder, or a hub id at its revision.
        cache: the folder that keeps downloaded adapters.
        controlnet: the folder of a ControlNet of the same family, as diffusers saves it.

    Raises:
        UserError: there is no such adapter, which names what was tried; a file differs from its checksum; the base is
            missing, has another digest, or is not named; or the ControlNet cannot be loaded.
        Unavailable: a server cannot be reached.
        MissingExtra: torch or another package of the extra `draw` is not installed.
    """
    extras.require(extra="draw", needed_by="load_pipeline")
    from lcmlora.inference import pipelines

    home = _project(project)
    found = open_adapter(str(reference), _places(home, settings, cache))
    base = None if base is None else Path(base)
    sources = home.root if home else Path()
    folder = found.weights.parent
    if (folder / bundle.PROVENANCE).is_file() and found.weights.name == bundle.WEIGHTS:
        return pipelines.load(folder, base, device, sources=sources, controlnet=controlnet)
    return pipelines.load_adapter(
        found.shown,
        found.weights,
        base,
        device,
        made_for=found.base,
        resolution=found.resolution,
        sampler=found.sampler,
        sources=sources,
        controlnet=controlnet,
    )


def _project(folder: Path | str | None) -> Project | None:
    """Returns the project in a folder; by default that in the current folder, None if there is none."""
    project = Project(Path() if folder is None else Path(folder))
    return project if folder is not None or project.params_file.is_file() else None


def _places(project: Project | None, settings: Registry | None, cache: Path | None) -> Places:
    if settings is not None:
        return Places(cache or downloads("adapters"), settings)
    found = Places.of_environment() if project is None else Places.of_project(project, project.settings())
    return found if cache is None else Places(cache, found.registry, found.publish, found.project)
