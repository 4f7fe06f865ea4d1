"""Finding the adapters and bases that people name on the command line.

adapters/emoji, release/emoji                     a folder that `distill`, `combine` or `package` wrote
style.safetensors                                 a file in any format, with the files beside it
models:/lcm-lora-emoji@champion, models:/NAME/3   a registered version (registry in params.yaml)
s3://bucket/prefix/MODEL/sha256-...               a published release, or a channel's pointer (.../champion.json)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lcmlora.adapters import lora, tensorfile
from lcmlora.adapters.layer_names import Architecture
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import architecture, folders
from lcmlora.config import Base, Config, Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.files import make_once
from lcmlora.io.terminal import note
from lcmlora.plugins import STORES
from lcmlora.project import Project
from lcmlora.releases import bundle
from lcmlora.releases.stores.store import scheme_of


@dataclass(frozen=True)
class AdapterReference:
    """An adapter that a person named, and the facts about it; None for unknown ones."""

    shown: str  # the reference as it was given
    weights: Path
    model: str | None = None
    base: dict[str, str | None] | None = None  # source, revision and digest of the base that it was made for
    resolution: int | None = None
    sampler: Sampler | None = None


def open_adapter(reference: str, config: Config | None, cache: Path) -> AdapterReference:
    """Returns the adapter that a reference names. A registered or published one is downloaded once.

    Args:
        config: the settings, if there is a params.yaml: they name the registry, and how S3 is reached.
        cache: the folder for downloaded releases.

    Raises:
        UserError: there is no such adapter, a file differs from its checksum, or a server cannot be reached.
    """
    if reference.startswith("models:/"):
        return _described(_registered(reference, config, cache), reference)
    if "://" in reference and scheme_of(reference) in STORES.names:
        return _described(_published(reference, config, cache), reference)
    path = Path(reference)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # such as a name that is too long, or a folder without permission
        raise UserError(f"{terminal.shown(reference)}: {error.strerror}") from None
    if is_folder:
        return _described(path, reference)
    if is_file:
        # Only lcmlora's own files have facts beside them: any folder may have a config.json of another program.
        ours = path.name == lora.WEIGHTS or (
            (path.parent / bundle.PROVENANCE).is_file() and path.name == bundle.read_facts(path.parent).kohya
        )
        return _described(path.parent, reference, path) if ours else AdapterReference(reference, path)
    raise UserError(
        f"{reference}: no such adapter; expected a folder, a .safetensors file, models:/NAME@ALIAS or "
        "s3://bucket/.../MODEL/sha256-..."
    )


def _registered(reference: str, config: Config | None, cache: Path) -> Path:
    from lcmlora import registry

    if config is None:
        raise UserError(f"{reference}: needs registry in params.yaml, and there is none here; see --params")
    version = registry.resolve(reference, config.registry)
    return registry.pull(version.reference, config.registry, cache / f"sha256-{version.sha256[:12]}")


def _published(reference: str, config: Config | None, cache: Path) -> Path:
    from lcmlora.releases import catalog

    settings = config.publish if config else Publish(to=reference)
    uri, sha256 = catalog.find_release(reference, settings)
    return _cached(cache, sha256, lambda folder: catalog.download_release(uri, settings, folder))


def _cached(cache: Path, sha256: str, download: Callable[[Path], None]) -> Path:
    """Returns the folder of a downloaded release, which appears whole or not at all."""
    target = cache / f"sha256-{sha256[:12]}"

    def is_there() -> bool:
        if not target.is_dir():
            return False
        try:
            bundle.verify(target)
        except UserError as error:
            note(f"note: {error}; it is downloaded again")
            return False
        return bundle.digest(target) == sha256

    def fill(folder: Path) -> None:
        download(folder)
        bundle.verify(folder)
        if (found := bundle.digest(folder)) != sha256:
            raise UserError(f"{target}: expected the adapter {sha256[:12]}..., downloaded {found[:12]}...")

    make_once(target, is_there, fill)
    return target


def _described(folder: Path, shown: str, weights: Path | None = None) -> AdapterReference:
    sealed = (folder / bundle.CHECKSUMS).is_file()
    weights = weights or (folder / lora.WEIGHTS if sealed else tensorfile.find(folder))
    if sealed:
        bundle.verify(folder, {weights.name, bundle.SCHEDULER, bundle.PROVENANCE})
    facts = bundle.read_facts(folder)
    return AdapterReference(shown, weights, facts.model, facts.base, facts.resolution, facts.sampler)


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
    name: str | None, adapter: AdapterReference, config: Config | None, project: Project
) -> BaseReference | None:
    """Returns the named base, else the adapter's own. Returns None if the adapter does not name its base.

    Args:
        name: a name under `bases` in params.yaml, or a diffusers folder; None for the adapter's own base.
        project: the adapter's own base may be named by a path in it.

    Raises:
        UserError: there is no such base.
    """
    if name is None:
        source = (adapter.base or {}).get("source") or ""
        if config and adapter.model in config.bases and config.bases[adapter.model].source == source:
            return _in_project(adapter.model, config, project)
        return _at(project.root / source, adapter) if source and (project.root / source).is_dir() else None
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
