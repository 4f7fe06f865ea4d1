"""Loading an adapter by its name, ready to draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora import extras
from lcmlora.config import Registry
from lcmlora.io.private import downloads
from lcmlora.project import Project
from lcmlora.registry.references import Places, open_release

if TYPE_CHECKING:
    from lcmlora.inference.pipelines import Pipeline


def load_pipeline(
    reference: str,
    device: str = "auto",
    *,
    project: Path = Path(),
    settings: Registry | None = None,
    base: Path | None = None,
    cache: Path | None = None,
    controlnet: Path | None = None,
) -> Pipeline:
    """Returns a pipeline that draws with a released adapter, on its pinned base and with its scheduler.

    The adapter is downloaded once, and every file is checked. Where `project` is no project, MLFLOW_TRACKING_URI names
    the registry, and LCMLORA_PUBLISH_TO the store.

    Args:
        reference: `sdxl@champion`, `sdxl/3`, `models:/NAME@champion`, 12 or more digits of a SHA-256, `s3://...`, the
            folder of a release, or another form of lcmlora/registry/references.py. `sdxl` is the project's
            release/sdxl.
        device: auto, cpu or cuda.
        project: the project's folder. Its params.yaml names registry and store, and relative paths of bases start
            there.
        settings: of the registry; those of the project by default.
        base: the folder of the base; the one that the adapter names by default.
        cache: the folder that keeps downloaded adapters; $LCMLORA_CACHE/adapters or ~/.cache/lcmlora/adapters by
            default.
        controlnet: the folder of a ControlNet of the same family, as diffusers saves it.

    Raises:
        UserError: there is no such adapter, which says what was tried; a file differs from its checksum; the base is
            missing or has another digest; or the ControlNet cannot be loaded.
        Unavailable: a server cannot be reached.
        MissingExtra: torch or another package of the extra `draw` is not installed, or one of `registry`.
    """
    extras.require(extra="draw", needed_by="load_pipeline")
    from lcmlora.inference import pipelines

    folder = open_release(reference, _places(project, settings, cache or downloads("adapters")))
    return pipelines.load(folder, base, device, sources=project, controlnet=controlnet)


def _places(folder: Path, settings: Registry | None, cache: Path) -> Places:
    project = Project(folder)
    if project.params_file.is_file() or (settings is None and folder != Path()):  # a named folder must be a project
        places = Places.of_project(project, project.settings())
    else:
        places = Places.of_environment()
    return replace(places, cache=cache, registry=settings or places.registry)
