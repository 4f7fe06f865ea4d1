"""Bringing a base here: downloaded, linked, converted or styled, and examined."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from lcmlora.bases import families, folders, singlefile, styled
from lcmlora.bases.examination import examine
from lcmlora.config import Base
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import temporaries
from lcmlora.io.files import atomic_write, make_folder, sha256_file


def fetch(name: str, base: Base, root: Path, sources: Path = Path()) -> Path:
    """Puts the base at `root/name`, examines it and returns that folder.

    A hub id is downloaded at its revision, a local folder linked, a single-file checkpoint converted. Idempotent; a
    changed revision or variant downloads again, a changed file is converted again. With a style the folder is a copy
    that has it in its UNet, and the plain base is at `root/.plain/name`. What the examination found is kept in
    `root/.examined`, so that no later stage reads the whole base for it.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: a hub id without revision, a base with a fault (see `examine.examine`), a file that is no checkpoint
            of this family, or what the hub does not know or does not let this user have.
        Unavailable: the hub does not answer.
    """
    make_folder(root)
    with temporaries.locked(root / name):  # another process may need the same base at the same moment
        return _fetch(name, base, root, sources)


def _fetch(name: str, base: Base, root: Path, sources: Path) -> Path:
    target = root / name
    if base.style is None and (target / styled.MARKER).is_file():
        shutil.rmtree(target)
    if base.style is not None:
        plain = fetch(name, base.model_copy(update={"style": None}), root / ".plain", sources)
        styled.make(name, base, plain, target, sources)
    elif singlefile.names_a_file(base.source):
        if base.config is not None and _is_local(base.config, sources):
            folders.check_folder(sources / base.config)
        singlefile.convert(name, base, target, sources)
    elif _is_local(base.source, sources):
        _link(sources / base.source, target, base.variant)
    elif base.revision is None:
        raise UserError(
            f"bases.{name}.revision: {base.source} is a hub id and needs a pinned commit to be reproducible"
        )
    else:
        _download(name, base, target)
    if os.access(root, os.W_OK):  # bases on a disk that is read-only are examined by each process
        (root / examine.RECORDS).mkdir(exist_ok=True)
    examine.examine(name, target, base.variant)
    return target


def _link(source: Path, target: Path, variant: str | None) -> None:
    """Makes `target` a link to a local folder that is a base."""
    if source.resolve() == target.resolve():
        return
    examine.examine(target.name, source, variant)  # before anything is in the way of another source
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if target.exists():
        raise UserError(f"{target} is in the way of the link to {source}; move it or rename the base")
    target.symlink_to(source.resolve(), target_is_directory=True)


def _download(name: str, base: Base, target: Path) -> None:
    """Downloads a hub id's files to `target`, unless they are there; a marker tells that they are, and all of them."""
    marker = target / ".revision"
    wanted = f"{base.source}@{base.revision} {base.variant or ''}\n"
    if marker.is_file() and marker.read_text() == wanted:
        return
    # Beside the folder: where the hub does not answer, its client takes any folder that is not empty for what was asked
    # for, whatever revision it is of.
    begun = target.with_name(f".{target.name}.begun")
    if target.is_symlink():  # the base was a folder before, into which nothing must be downloaded
        target.unlink()
    elif any(path.is_file() and path.read_text() != wanted for path in (marker, begun, target / singlefile.MARKER)):
        if target.is_dir():
            shutil.rmtree(target)
    elif target.exists() and not begun.is_file() and not (target / ".cache" / "huggingface").is_dir():
        raise UserError(f"{target} is in the way of the download of {base.source}; move it or rename the base")
    target.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(wanted)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            base.source, revision=base.revision, local_dir=target, allow_patterns=download_patterns(base.variant)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        kind = Unavailable if _is_passing(error) else UserError
        raise kind(f"bases.{name}: cannot download {base.source} at {base.revision}: {reason}") from error
    try:
        examine.examine(name, target, base.variant)
    except UserError as error:
        raise UserError(
            f"bases.{name}: what {base.source} has at {base.revision}, or what arrived of it, is no base that can be "
            f"distilled: {error}"
        ) from None
    atomic_write(marker, lambda path: path.write_text(wanted))
    begun.unlink()


def _is_passing(error: Exception) -> bool:
    """Returns whether a download may succeed later: the hub did not answer, or was busy."""
    from httpx2 import TransportError  # the hub's own client
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    # What the hub does not know is one of its HTTP errors; with this one no connection came about.
    return isinstance(error, ConnectionError | TimeoutError | TransportError | LocalEntryNotFoundError)


def _is_local(place: str, sources: Path) -> bool:
    return (sources / place).exists() or place.startswith((".", "/", "bases/"))


def download_patterns(variant: str | None) -> list[str]:
    """Returns which files of a hub repository make a base, as the hub's patterns, in which `*` also matches `/`.

    They are named one by one, since repositories also hold single-file checkpoints, ONNX and OpenVINO exports, a second
    VAE (SDXL's vae_1_0), weights without averaging (SD-V1.5's non_ema) and pickles; together ten times the download.
    """
    patterns = ["model_index.json", "scheduler/*.json", "feature_extractor/*.json"]
    for family in families.known():
        patterns += [f"{part.folder}/*.{kind}" for part in family.tokenizers for kind in ("json", "txt")]
        for part in (family.network, family.vae, *family.text_encoders):
            stem = part.weights
            # Above the hub's usual size a file comes in shards, `-00001-of-00002`.
            files = (f"{stem}.{variant}", f"{stem}.{variant}-*-of-*") if variant else (stem, f"{stem}-*-of-*")
            patterns += [f"{part.folder}/*.json", *(f"{part.folder}/{file}.safetensors" for file in files)]
    return list(dict.fromkeys(patterns))


def base_state(name: str, base: Base, sources: Path = Path()) -> str:
    """Returns a local base's fingerprint, or the commit at which the hub's repository is now; with that of its style.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        Unavailable: the hub does not answer.
        UserError: there is no such folder, file or repository.
    """
    if base.style is not None:
        plain = base_state(name, base.model_copy(update={"style": None}), sources)
        return f"{plain} {_local_state(sources / base.style.source)}"
    if base.revision is None:
        return _local_state(sources / base.source)
    from httpx2 import HTTPError  # which the hub's client does not turn into an error of its own
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        head = HfApi().model_info(base.source, timeout=30).sha
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(f"bases.{name}: {base.source}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        raise Unavailable(f"bases.{name}: the hub does not answer: {' '.join(str(error).split())}") from error
    return str(head)


def _local_state(path: Path) -> str:
    """Returns a digest of a file's bytes, or of the names, sizes and times of a folder's files, links followed."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    known = hashlib.sha256()
    seen: set[tuple[int, int]] = set()  # a link may lead to a folder above it
    for root, inner, files in os.walk(path, followlinks=True):
        told = Path(root).stat()
        if (told.st_dev, told.st_ino) in seen:
            inner.clear()
            continue
        seen.add((told.st_dev, told.st_ino))
        inner.sort()
        for name in sorted(files):
            found = Path(root, name)
            told = found.stat() if found.exists() else found.lstat()
            known.update(f"{found.relative_to(path)}\0{told.st_size}\0{told.st_mtime_ns}\n".encode())
    return known.hexdigest()
