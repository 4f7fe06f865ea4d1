"""Fetching a base: it is downloaded, linked or converted, gets its style, and is examined."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from lcmlora.bases import families, folders, singlefile, styled
from lcmlora.bases.examination.examine import RECORDS, examine_base
from lcmlora.config import Base
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import temporaries
from lcmlora.io.files import atomic_write, make_folder, sha256_file
from lcmlora.io.private import downloads


def fetch(name: str, base: Base, root: Path, sources: Path = Path()) -> Path:
    """Puts the base at `root/name`, examines it and returns that folder.

    A hub id is downloaded at its revision, a local folder linked, a single-file checkpoint converted. Idempotent; a
    changed revision or variant downloads again, a changed file is converted again. A base with a style is a copy with
    the style in its UNet, of the base without it at `root/.plain/name`. The examination is recorded in
    `root/.examined`, so that later stages need not read the whole base again.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: a hub id without revision, a base with a fault (see `examine_base`), a file that is no checkpoint of
            a known family, or a repository that does not exist on the hub or that this user may not read.
        Unavailable: the hub does not answer.
    """
    make_folder(root)
    with temporaries.locked(root / name):  # against another process that fetches the same base
        return _fetch(name, base, root, sources)


def fetch_pinned(source: str, revision: str, variant: str | None) -> Path:
    """Returns the folder of a base of the hub at a revision, which is downloaded once to the user's cache.

    Raises:
        UserError: as of `fetch`.
        Unavailable: the hub does not answer.
    """
    name = f"{source.replace('/', '--')}@{revision}" + (f".{variant}" if variant else "")
    # Resolution and licence make no difference to a download.
    base = Base(source=source, revision=revision, variant=variant, resolution=1, license="unknown")
    return fetch(name, base, downloads("bases"))


def _fetch(name: str, base: Base, root: Path, sources: Path) -> Path:
    target = root / name
    if base.style is None and (target / styled.MARKER).is_file():
        shutil.rmtree(target)
    if base.style is not None:
        plain = fetch(name, base.model_copy(update={"style": None}), root / ".plain", sources)
        styled.make_styled_base(name, base, plain, target, sources)
    elif singlefile.names_a_file(base.source):
        if base.config is not None and _is_local(base.config, sources):
            folders.check_folder(sources / base.config)
        singlefile.convert_checkpoint(name, base, target, sources)
    elif _is_local(base.source, sources):
        _link(sources / base.source, target, base.variant)
    elif base.revision is None:
        raise UserError(
            f"bases.{name}.revision: {base.source} is a hub id and needs a pinned commit to be reproducible"
        )
    else:
        _download(name, base, target)
    if os.access(root, os.W_OK):  # on a read-only disk each process examines the base
        (root / RECORDS).mkdir(exist_ok=True)
    examine_base(name, target, base.variant)
    return target


def _link(source: Path, target: Path, variant: str | None) -> None:
    """Makes `target` a link to a local folder that is a base."""
    if source.resolve() == target.resolve():
        return
    examine_base(target.name, source, variant)  # a base with a fault is not linked
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if target.exists():
        raise UserError(f"{target} is in the way of the link to {source}; move it or rename the base")
    target.symlink_to(source.resolve(), target_is_directory=True)


def _download(name: str, base: Base, target: Path) -> None:
    """Downloads a hub id's files to `target`, unless the marker there says that all of them were downloaded."""
    marker = target / ".revision"
    revision = f"{base.source}@{base.revision} {base.variant or ''}\n"
    if marker.is_file() and marker.read_text() == revision:
        return
    # The mark of a begun download is beside the folder: if the hub does not answer, its client takes any folder with
    # files for the requested one, whatever its revision.
    begun = target.with_name(f".{target.name}.begun")
    if target.is_symlink():  # to the local folder that the base was before; nothing must be downloaded into that
        target.unlink()
    elif any(path.is_file() and path.read_text() != revision for path in (marker, begun, target / singlefile.MARKER)):
        if target.is_dir():
            shutil.rmtree(target)
    elif target.exists() and not begun.is_file() and not (target / ".cache" / "huggingface").is_dir():
        raise UserError(f"{target} is in the way of the download of {base.source}; move it or rename the base")
    target.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            base.source, revision=base.revision, local_dir=target, allow_patterns=download_patterns(base.variant)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        error_class = Unavailable if is_temporary(error) else UserError
        raise error_class(f"bases.{name}: cannot download {base.source} at {base.revision}: {reason}") from error
    try:
        examine_base(name, target, base.variant)
    except UserError as error:
        raise UserError(
            f"bases.{name}: what {base.source} has at {base.revision}, or what arrived of it, is no base that can be "
            f"distilled: {error}"
        ) from None
    atomic_write(marker, lambda path: path.write_text(revision))
    begun.unlink()


def is_temporary(error: Exception) -> bool:
    """Returns whether the same download may succeed later: the hub did not answer, or was busy."""
    from httpx2 import TransportError  # the hub's own client
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    # LocalEntryNotFoundError: there was no connection, and the hub's cache has no such file.
    return isinstance(error, ConnectionError | TimeoutError | TransportError | LocalEntryNotFoundError)


def _is_local(place: str, sources: Path) -> bool:
    return (sources / place).exists() or place.startswith((".", "/", "bases/"))


def download_patterns(variant: str | None) -> list[str]:
    """Returns the hub's patterns (`*` also matches `/`) of the files of a repository that make a base.

    Every kind of file is named, since repositories also hold single-file checkpoints, ONNX and OpenVINO exports, a
    second VAE (SDXL's vae_1_0), weights without averaging (SD-V1.5's non_ema) and pickles; together ten times the
    download.
    """
    patterns = ["model_index.json", "scheduler/*.json", "feature_extractor/*.json"]
    for family in families.known():
        patterns += [f"{part.folder}/*.{kind}" for part in family.tokenizers for kind in ("json", "txt")]
        for part in (family.network, family.vae, *family.text_encoders):
            stem = part.weights
            # Large files are split into shards, `-00001-of-00002`.
            files = (f"{stem}.{variant}", f"{stem}.{variant}-*-of-*") if variant else (stem, f"{stem}-*-of-*")
            patterns += [f"{part.folder}/*.json", *(f"{part.folder}/{file}.safetensors" for file in files)]
    return list(dict.fromkeys(patterns))


def base_state(name: str, base: Base, sources: Path = Path()) -> str:
    """Returns a digest of a local base, or the current commit of its repository on the hub; and its style's digest.

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
    from httpx2 import HTTPError  # the hub's client raises these as they are
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
    sha256 = hashlib.sha256()
    seen: set[tuple[int, int]] = set()  # a link may lead to a folder above it
    for root, folders_inside, files in os.walk(path, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders_inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders_inside.sort()
        for name in sorted(files):
            file = Path(root, name)
            status = file.stat() if file.exists() else file.lstat()
            sha256.update(f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return sha256.hexdigest()
