"""Naming an adapter. Every verb of the command line, and `lcmlora.load_pipeline`, take the same names:

    adapters/emoji, release/emoji            a folder that `distill`, `combine`, `package` or `pull` wrote
    style.safetensors                        a file in any format, with the files beside it
    emoji                                    the project's adapters/emoji
    emoji@champion, emoji/3                  a version of lcm-lora-emoji in MLflow's registry
    models:/NAME@champion, models:/NAME/3    a version under the exact name that MLflow has
    60a5d3e41c9b                             12 digits or more of an adapter's SHA-256: in the registry, then the store
    emoji/sha256-60a5d3e41c9b                a release in the store (publish.to)
    s3://bucket/.../emoji/sha256-...         a release, or a channel's pointer (.../channels/champion.json)
    hf://owner/name@champion                 a release that lcmlora published on the hub, by its channel or digest
    latent-consistency/lcm-lora-sdxl         a repository of the hub; OWNER/NAME@COMMIT is one state of it

A file or folder that exists comes first. An alias that the registry does not have is looked for among the channels of
the store, which is said in a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lcmlora import masking, names
from lcmlora.adapters.metadata import USUAL_STEPS, WEIGHTS, Sampler
from lcmlora.config import Config, Publish, Registry
from lcmlora.errors import NotFound, UserError
from lcmlora.io import terminal
from lcmlora.io.files import make_once, sha256_file
from lcmlora.io.private import downloads
from lcmlora.io.terminal import note
from lcmlora.plugins import STORES
from lcmlora.project import Project
from lcmlora.registry.lookup import PREFIX, Version, registered_name
from lcmlora.releases import bundle, catalog
from lcmlora.releases.stores.store import scheme_of

FORMS = (
    "a folder, a .safetensors file, MODEL, MODEL@ALIAS, MODEL/VERSION, models:/NAME@ALIAS, 12 digits of a SHA-256, "
    "s3://bucket/.../MODEL/sha256-..., hf://owner/name@CHANNEL or a hub id"
)
_SQLITE = "sqlite:///"
_NO_STORE = "there is no store: set LCMLORA_PUBLISH_TO"


@dataclass(frozen=True)
class Local:
    """A file or folder."""

    path: Path


@dataclass(frozen=True)
class Model:
    """The adapter that the project has distilled for a model."""

    name: str


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, by its number or an alias."""

    name: str  # such as lcm-lora-emoji
    version: str  # a number, or @ALIAS

    @property
    def text(self) -> str:
        """The version as `registry.resolve` takes it."""
        exact = "" if self.name.startswith(PREFIX) else "models:/"
        return exact + self.name + (self.version if self.version.startswith("@") else f"/{self.version}")


@dataclass(frozen=True)
class Digits:
    """The first digits of an adapter's SHA-256, as it was trained or as it was released."""

    text: str


@dataclass(frozen=True)
class Published:
    """A release: its address, or MODEL/sha256-DIGITS in the store."""

    text: str


@dataclass(frozen=True)
class Hub:
    """A repository of the hub."""

    repository: str
    revision: str | None


Form = Local | Model | Registered | Digits | Published | Hub


def parse(reference: str) -> Form:
    """Returns the form of a reference. What it names need not exist, but for files and folders.

    Raises:
        UserError: the reference has none of the forms.
    """
    if reference.startswith("models:/"):
        match = re.fullmatch(r"models:/([^@/]+)(?:/([0-9]+)|(@[^@/]+))", reference)
        if match is None:
            raise UserError(f"{reference}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
        return Registered(match[1], match[2] or match[3])
    if "://" in reference:
        if scheme_of(reference) not in STORES.names:
            raise UserError(f"{reference}: expected {FORMS}; download a file from such an address yourself")
        return Published(reference)
    if _exists(reference):
        return Local(Path(reference))
    if match := re.fullmatch(r"([^@/]+)(?:/([0-9]{1,9})|(@[^@/]+))", reference):
        return Registered(registered_name(match[1]), match[2] or match[3])
    if re.fullmatch(r"[0-9a-f]{12,64}", reference):
        return Digits(reference)
    if re.fullmatch(r"[^@/]+/sha256-[0-9a-f]+", reference):
        return Published(reference)
    if names.fault(reference) is None and not reference.endswith((".safetensors", ".json")):
        return Model(reference)
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]+))?", reference)
    if match and not reference.endswith(".safetensors") and not _is_path(match[1]):
        return Hub(match[1], match[2])
    raise UserError(f"{terminal.shown(reference)}: no such file or folder; expected {FORMS}")


def is_address(reference: str) -> bool:
    """Returns whether a reference says itself where the adapter is, without a store or a registry."""
    form = parse(reference)
    return isinstance(form, Local | Hub) or (isinstance(form, Published) and "://" in form.text)


def _exists(reference: str) -> bool:
    try:
        return Path(reference).is_dir() or Path(reference).is_file()
    except OSError as error:  # such as a name that is too long, or a folder without permission
        raise UserError(f"{terminal.shown(reference)}: {error.strerror}") from None


def _is_path(reference: str) -> bool:
    """Returns whether OWNER/NAME is rather meant as a path: there is such a folder, or a project has one."""
    folder = reference.partition("/")[0]
    return folder in ("adapters", "bases", "data", "release", "releases", "scratch") or Path(folder).is_dir()


@dataclass(frozen=True)
class Places:
    """Where adapters are looked for. Each place may be missing.

    cache: the folder that keeps what was downloaded.
    """

    cache: Path
    registry: Registry | None = None
    publish: Publish | None = None
    project: Project | None = None

    @classmethod
    def of_project(cls, project: Project, config: Config) -> Places:
        """Returns the places that a project's params.yaml names. Downloads go to the user's cache."""
        return cls(downloads("adapters"), config.registry, config.publish, project)

    @classmethod
    def of_environment(cls) -> Places:
        """Returns the places that MLFLOW_TRACKING_URI and LCMLORA_PUBLISH_TO name, for use outside a project.

        Downloads go to the user's cache ($LCMLORA_CACHE, or ~/.cache/lcmlora).
        """
        tracking, store = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("LCMLORA_PUBLISH_TO")
        return cls(
            downloads("adapters"),
            Registry(tracking_uri=tracking) if tracking else None,
            Publish(to=store) if store else None,
        )

    def store_of(self, reference: str) -> Publish:
        """Returns the settings of the store for an address or for the name of a release. Raises NotFound."""
        if self.publish is None and "://" not in reference:
            raise NotFound(f"{reference}: {_NO_STORE}")
        return self.publish or Publish(to=reference)


@dataclass
class _Search:
    """What was tried for a reference, for the message where nothing was found."""

    reference: str
    tried: list[str] = field(default_factory=list)

    def attempt(self, find: Callable[[], str | Version]) -> str | Version | None:
        """Returns what `find` returns, None where it raises NotFound."""
        try:
            return find()
        except NotFound as error:
            self.tried.append(str(error).removeprefix(f"{self.reference}: "))
            return None

    def failure(self) -> NotFound:
        """Returns the error that names everything that was tried, in one line."""
        shown = terminal.shown(self.reference)
        return NotFound(f"{shown}: no such adapter; tried: {'; '.join(self.tried)}")


@dataclass(frozen=True)
class AdapterReference:
    """An adapter that a person named, and the facts about it; None for unknown ones."""

    shown: str  # the reference as it was given
    weights: Path
    model: str | None = None
    base: dict[str, str | None] | None = None  # source, revision and digest of the base that it was made for
    resolution: int | None = None
    sampler: Sampler | None = None
    recommended_steps: int | None = None

    @property
    def usual_steps(self) -> int:
        """The number of steps to draw in, unless told otherwise."""
        return self.recommended_steps or USUAL_STEPS


def open_adapter(reference: str, places: Places, *, everything: bool = False) -> AdapterReference:
    """Returns the adapter that a reference names. A registered or published one is downloaded once.

    Args:
        everything: download the whole release, with its card and report, and not only what drawing needs.

    Raises:
        UserError: there is no such adapter, which names what was tried; a file differs from its checksum; or a package
            that this needs is not installed.
        Unavailable: a server cannot be reached.
    """
    form = parse(reference)
    if isinstance(form, Local):
        return _open_local(form.path, reference)
    if isinstance(form, Model):
        return _described(_of_project(form, places), reference)
    if isinstance(form, Hub):
        from lcmlora.registry import hub

        return _described(hub.download(form.repository, form.revision, places.cache), reference)
    if isinstance(form, Published):
        return _described(_download_release(reference, places, everything), reference)
    found = _find(form, reference, places)
    if isinstance(found, str):
        return _described(_download_release(found, places, everything), reference)
    return _described(_pull(found, form.text, places, everything), reference)


def open_release(reference: str, places: Places, *, everything: bool = False) -> Path:
    """Returns the folder of the release that a reference names, with which `inference.pipelines.load` can draw.

    MODEL names the project's release/MODEL, which the last run has packaged.

    Args:
        everything: as for `open_adapter`.

    Raises:
        UserError: as for `open_adapter`; or the adapter is no release, so that its base and sampler are not certain.
    """
    form = parse(reference)
    if isinstance(form, Model) and places.project is not None:
        folder = places.project.release(form.name)
        if not folder.is_dir():
            raise NotFound(
                f"{reference}: no such release; tried: no file or folder of this name; {folder} is not there, which "
                f"`lcmlora run` makes; {form.name}@champion names the registered one"
            )
    else:
        folder = open_adapter(reference, places, everything=everything).weights.parent
    if not (folder / bundle.PROVENANCE).is_file():
        raise UserError(
            f"{reference}: {folder} has no {bundle.PROVENANCE}, so it is no release of lcmlora; `lcmlora generate` "
            "draws with any adapter"
        )
    return folder


def find_version(reference: str, places: Places) -> Version:
    """Returns the registered version that a reference names; that of a folder, file or release by its SHA-256.

    Raises:
        UserError: it is not registered, or the reference names nothing.
        Unavailable: a server cannot be reached.
    """
    form = parse(reference)
    if isinstance(form, Hub):
        raise UserError(f"{reference}: is a repository of the hub, and no version in MLflow's registry")
    if isinstance(form, Registered):
        return _resolve(form.text, places)
    if isinstance(form, Digits):
        return _resolve(form.text, places)
    if isinstance(form, Published):
        _, sha256 = catalog.find_release(reference, places.store_of(reference), yanked=True)
    elif isinstance(form, Model):
        sha256 = sha256_file(_of_project(form, places) / WEIGHTS)
    else:
        sha256 = sha256_file(_open_local(form.path, reference).weights)
    try:
        return _resolve(sha256, places)
    except NotFound as error:
        raise NotFound(f"{reference}: {error}") from None


def find_release(reference: str, places: Places) -> str:
    """Returns the name or address of the release in a store that a reference names, for `releases.catalog`.

    MODEL@CHANNEL names the channel. Where there is no such channel, the registry's alias of this name is looked for.

    Raises:
        UserError: there is no such release, which names what was tried.
        Unavailable: a server cannot be reached.
    """
    form = parse(reference)
    if isinstance(form, Published):
        return reference
    if isinstance(form, Hub):
        raise UserError(f"{reference}: is a repository of the hub, and no release of a store")
    if isinstance(form, Local):
        if (form.path / catalog.MANIFEST).is_file() or form.path.suffix == ".json" or places.publish is None:
            return reference  # a release in a directory, or a channel's pointer
        return _published_as(sha256_file(_open_local(form.path, reference).weights), reference, places)
    if isinstance(form, Model):
        return _published_as(sha256_file(_of_project(form, places) / WEIGHTS), reference, places)
    search = _Search(reference)
    ways = [lambda: _in_store(form, places), lambda: _address(_resolve(form.text, places))]
    for way in ways if not reference.startswith("models:/") else ways[1:]:
        if (found := search.attempt(way)) is not None:
            return str(found)
    raise search.failure()


def _find(form: Registered | Digits, reference: str, places: Places) -> Version | str:
    """Returns the version in the registry, else the address of the release in the store."""
    search = _Search(reference)
    found = search.attempt(lambda: _resolve(form.text, places))
    if found is None and not reference.startswith("models:/"):
        found = search.attempt(lambda: _in_store(form, places))
        if found is not None:
            note(f"note: {reference}: is the release {found}; {search.tried[0]}")
    if found is None:
        raise search.failure()
    return found


def _resolve(text: str, places: Places) -> Version:
    from lcmlora import registry

    settings = places.registry
    if settings is None:
        raise NotFound(
            f"{text}: there is no registry: set MLFLOW_TRACKING_URI, or name a project's folder (with params.yaml)"
        )
    if _lacks_database(settings):
        raise NotFound(f"{text}: nothing is registered at {masking.address(settings.tracking_uri)} yet")
    return registry.resolve(text, settings, cache=places.cache)


def _lacks_database(settings: Registry) -> bool:
    """Returns whether the registry is a file that is missing; looking into it would make it."""
    uri = settings.tracking_uri
    return uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE).partition("?")[0]).exists()


def _in_store(form: Registered | Digits, places: Places) -> str:
    """Returns the address of a release in the store: of a channel of that name, or of an adapter with these digits."""
    if places.publish is None:
        raise NotFound(_NO_STORE)
    if isinstance(form, Digits):
        return catalog.find_digits(form.text, places.publish)
    if not form.version.startswith("@"):
        raise NotFound("a store has no numbered versions")
    return catalog.find_release(f"{form.name.removeprefix(PREFIX)}{form.version}", places.publish)[0]


def _address(version: Version) -> str:
    if version.release_uri is None:
        raise NotFound(f"{version.reference} was never published")
    return version.release_uri


def _published_as(sha256: str, reference: str, places: Places) -> str:
    search = _Search(reference)
    found = search.attempt(lambda: _in_store(Digits(sha256), places))
    if found is None:
        raise search.failure()
    return str(found)


def _of_project(form: Model, places: Places) -> Path:
    """Returns the folder of a model's adapter in the project."""
    if places.project is None:
        raise NotFound(
            f"{form.name}: no such adapter; tried: no file or folder of this name; no project here (params.yaml), "
            f"so no adapters/{form.name}; {form.name}@champion names the registered one"
        )
    folder = places.project.adapter(form.name)
    if not folder.is_dir():
        raise NotFound(
            f"{form.name}: no such adapter; tried: no file or folder of this name; {folder} is not there, which "
            f"`lcmlora run` makes; {form.name}@champion names the registered one"
        )
    return folder


def _open_local(path: Path, reference: str) -> AdapterReference:
    if path.is_dir():
        return _described(path, reference)
    # Only lcmlora's own files have facts beside them: any folder may have a config.json of another program.
    ours = path.name == WEIGHTS or (
        (path.parent / bundle.PROVENANCE).is_file() and path.name == bundle.read_facts(path.parent).kohya
    )
    return _described(path.parent, reference, path) if ours else AdapterReference(reference, path)


def _pull(version: Version, name: str, places: Places, everything: bool) -> Path:
    from lcmlora.registry.downloads import pulling
    from lcmlora.registry.lookup import canonical

    assert places.registry is not None
    return pulling.pull_to_cache(version, places.registry, places.cache, [canonical(name)], everything=everything)


def _download_release(reference: str, places: Places, everything: bool) -> Path:
    """Returns the folder of a downloaded release, which appears whole or not at all."""
    settings = places.store_of(reference)
    uri, sha256 = catalog.find_release(reference, settings)
    target = places.cache / f"sha256-{sha256[:12]}{'-all' if everything else ''}"
    checked = None if everything else bundle.ADAPTER_FILES

    def is_there() -> bool:
        if not target.is_dir():
            return False
        try:
            bundle.verify(target, checked)
        except UserError as error:
            note(f"note: {error}; it is downloaded again")
            return False
        return bundle.digest(target) == sha256

    def fill(folder: Path) -> None:
        catalog.download_release(uri, settings, folder, everything=everything)
        bundle.verify(folder, checked)
        if (found := bundle.digest(folder)) != sha256:
            raise UserError(f"{target}: expected the adapter {sha256[:12]}..., downloaded {found[:12]}...")

    make_once(target, is_there, fill)
    return target


def _described(folder: Path, shown: str, weights: Path | None = None) -> AdapterReference:
    sealed = (folder / bundle.CHECKSUMS).is_file()
    if weights is None and sealed:
        weights = folder / WEIGHTS
    elif weights is None:
        from lcmlora.adapters import tensorfile  # which needs torch

        weights = tensorfile.find(folder)
    if sealed:
        bundle.verify(folder, {weights.name, bundle.SCHEDULER, bundle.PROVENANCE})
    facts = bundle.read_facts(folder)
    return AdapterReference(
        shown, weights, facts.model, facts.base, facts.resolution, facts.sampler, facts.recommended_steps
    )
