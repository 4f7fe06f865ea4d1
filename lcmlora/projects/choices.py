"""What `lcmlora init` is asked for, checked and turned into entries of params.yaml: the base, the data, the store.

A path is relative to the current folder. In params.yaml it is relative to the project's folder where it lies in that,
and absolute elsewhere, so that it works from inside the project.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lcmlora import names
from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject
from lcmlora.io.terminal import shown
from lcmlora.plugins import SOURCES, STORES
from lcmlora.projects import hub
from lcmlora.settings import presets

EMOJI = "emoji"  # the base of the demo
UNKNOWN = "unknown"  # the license that a card names where nobody said it; the hub knows this word

_INDEX = "model_index.json"  # of a diffusers folder
_CHECKPOINT = ".safetensors"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_PROMPTS = ".txt"

Ask = Callable[[str, str | None], str]  # asks a person; gets the question and the answer that Enter gives


@dataclass(frozen=True)
class Base:
    """A model's base: its name in params.yaml and the entry of `bases`, empty for a published base."""

    name: str
    entry: JsonObject


@dataclass(frozen=True)
class BaseOptions:
    """The options of `lcmlora init` that say more about a base. None: not given."""

    name: str | None = None
    like: str | None = None
    config: str | None = None
    license: str | None = None

    def refuse(self, base: str) -> None:
        """Raises UserError if any is given, for a base about which all of it is known."""
        given = [key for key in ("name", "like", "config", "license") if getattr(self, key) is not None]
        if given:
            raise UserError(f"--{given[0]}: the base {base} has its own; leave the option out")


def choose_base(text: str, options: BaseOptions, root: Path, ask: Ask | None = None) -> Base:
    """Returns the base that `text` names: a published one, a diffusers folder, a .safetensors file, or a hub id.

    A hub id without a commit (OWNER/NAME@COMMIT) is pinned to the newest one. A published base is found by its hub id,
    too.

    Args:
        root: the project's folder.
        ask: asks for the family and the license of a base of which they are not known; None where nobody can answer.

    Raises:
        UserError: there is no such base, or its family is not known.
        Unavailable: the hub does not answer.
    """
    known = presets.load().bases
    if text in known:
        options.refuse(text)
        return Base(text, {})
    hub_id, _, revision = text.partition("@")
    published = next((name for name, base in known.items() if base["source"] == hub_id), None)
    path = Path(text).expanduser()
    if published and not path.exists():
        if not revision:
            options.refuse(hub_id)
            return Base(published, {})
        facts = {"source": hub_id, "revision": revision, "license": known[published]["license"]}
        return _completed(facts, published, options, root, ask)
    if path.suffix.lower() in _PICKLES and path.is_file():
        raise UserError(f"--base: {path}: a pickle can run any code when it is read; expected {_CHECKPOINT}")
    if path.is_dir():
        if not (path / _INDEX).is_file():
            raise UserError(f"--base: {path}: a diffusers base has a {_INDEX}, and there is none")
        return _completed({"source": _source_of(path, root)}, _name_of(_absolute(path).name), options, root, ask)
    if path.suffix.lower() == _CHECKPOINT and path.is_file():
        return _completed({"source": _source_of(path, root)}, _name_of(path.stem), options, root, ask)
    if not hub.is_id(hub_id) or text.startswith((".", "/", "~")):
        raise UserError(
            f"--base: {shown(text, 200)}: there is no such folder or file, and it is no published base "
            f"({', '.join(known)}), not {EMOJI}, and no hub id (OWNER/NAME)"
        )
    return _completed(hub.facts(hub_id, revision or None), _name_of(hub_id.rpartition("/")[2]), options, root, ask)


def _completed(entry: JsonObject, name: str, options: BaseOptions, root: Path, ask: Ask | None) -> Base:
    """Returns the base with the keys that the options give, or that a person is asked for."""
    name = options.name or name
    if wrong := names.fault(name):
        raise UserError(f"--name: {shown(repr(name), 80)} {wrong}")
    if options.config is not None:
        if not entry["source"].endswith(_CHECKPOINT):
            raise UserError(f"--config: goes with a {_CHECKPOINT} file, and the base is {entry['source']}")
        config = Path(options.config).expanduser()
        entry["config"] = _source_of(config, root) if config.exists() else options.config
    if options.like is not None:
        entry["like"] = options.like
    try:
        family = presets.complete(name, entry | {"resolution": 1}, root).values.get("like")
    except UserError as error:
        raise UserError(f"--like: {str(error).removeprefix('like: ')}") from None
    if family is None:
        families = ", ".join(presets.load().families)
        if ask is None:
            source = shown(entry["source"], 200)
            raise UserError(f"--base: {source}: its family is not known; name it by --like ({families})")
        entry["like"] = ask(f"The family of {name}, whose settings it gets ({families})", None)
    if options.license is not None:
        entry["license"] = options.license
    elif "license" not in entry:
        entry["license"] = ask(f"The license of {name}, for the adapter's card", UNKNOWN) if ask else UNKNOWN
    order = ("source", "revision", "variant", "config", "like", "license")
    return Base(name, {key: entry[key] for key in order if key in entry})


def choose_data(text: str, kind: str | None, root: Path) -> JsonObject:
    """Returns the keys of `data` for captioned pictures: a folder, tables or tar files, here or at s3://.

    Args:
        kind: of the source; by default it follows from the names of the files.

    Raises:
        UserError: there is no such path, its kind is not known, or the project lies in it.
        Unavailable: the bucket does not answer.
    """
    if kind is not None:
        try:
            SOURCES.check(kind)
        except ValueError as error:
            raise UserError(f"--kind: got {shown(repr(kind), 80)}: {error}") from None
    if "://" in text:
        return {"source": kind or _kind_of(text), "path": text}
    path = Path(text).expanduser()
    if not path.exists():
        advice = f"; a data set of the hub comes by `hf download --repo-type dataset {text} --local-dir pictures`"
        raise UserError(f"--data: {shown(text, 200)}: no such folder or file{advice if hub.is_id(text) else ''}")
    if _absolute(root).is_relative_to(_absolute(path)):
        raise UserError(f"--data: {shown(text, 200)}: the project must not lie in its own data set")
    return {"source": kind or _kind_of(str(path)), "path": _located(path, root)}


def choose_prompts(text: str, root: Path) -> JsonObject:
    """Returns the keys of `data` for a file of prompts, or a folder of them. Raises UserError if there is none."""
    if "://" in text:
        return {"source": "prompts", "path": text}
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(f"--prompts: {shown(text, 200)}: no such file")
    return {"source": "prompts", "path": _located(path, root)}


def choose_store(text: str, root: Path) -> str:
    """Returns `publish.to` for a folder, which need not exist, or an address. Raises UserError if it is neither."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        return _located(Path(text).expanduser(), root)
    try:
        STORES.check(scheme)
    except ValueError as error:
        raise UserError(f"--publish: {shown(text, 200)}: {error} before ://, or a folder") from None
    return text


def _kind_of(path: str) -> str:
    if path.lower().endswith(_PROMPTS):
        return "prompts"
    from lcmlora.data.sources.guess import source_of

    try:
        return source_of(path)
    except UserError as error:
        raise type(error)(str(error).replace("data.path:", "--data:", 1)) from None


def _name_of(text: str) -> str:
    """Returns a name for the model, made of the name of a folder, file or repository."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64].rstrip(".")


def _source_of(path: Path, root: Path) -> str:
    """Returns a base's path for params.yaml; one in the project begins with a dot, as a hub id never does."""
    located = _located(path, root)
    return located if Path(located).is_absolute() else f"./{located}"


def _located(path: Path, root: Path) -> str:
    absolute, folder = _absolute(path), _absolute(root)
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)


def _absolute(path: Path) -> Path:
    """Returns the absolute path without `..`. Links stay: a person may mean to move what they lead to."""
    return path.resolve() if ".." in path.parts else path.absolute()
