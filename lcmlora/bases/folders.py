"""The folder of a base: brought here, checked, and named for good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lcmlora.bases import singlefile
from lcmlora.bases.examination import examine
from lcmlora.bases.examination.weightfiles import WEIGHTS
from lcmlora.config import Base
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import temporaries
from lcmlora.io.files import atomic_write, make_folder


def fetch(name: str, base: Base, root: Path = Path("bases")) -> Path:
    """Puts the base at `root/name`, examines it and returns that folder.

    A hub id is downloaded at its revision, a local folder linked, a single-file checkpoint converted. Idempotent; a
    changed revision or variant downloads again, a changed file is converted again. With a style the folder is a copy
    that has it in its UNet, and the plain base is at `root/.plain/name`. What the examination found is kept in
    `root/.examined`, so that no later stage reads the whole base for it.

    Raises:
        UserError: a hub id without revision, a base with a fault (see `examine.examine`), a file that is no checkpoint
            of this family, or what the hub does not know or does not let this user have.
        Unavailable: the hub does not answer.
    """
    make_folder(root)
    with temporaries.locked(root / name):  # another process may need the same base at the same moment
        return _fetch(name, base, root)


def _fetch(name: str, base: Base, root: Path) -> Path:
    target = root / name
    from lcmlora.bases import styled

    if base.style is None and (target / styled.MARKER).is_file():
        shutil.rmtree(target)
    if base.style is not None:
        styled.make(name, base, fetch(name, base.model_copy(update={"style": None}), root / ".plain"), target)
    elif singlefile.names_a_file(base.source):
        if base.config is not None and _is_local(base.config):
            check_folder(Path(base.config))
        singlefile.convert(name, base, target)
    elif _is_local(base.source):
        _link(Path(base.source), target, base.variant)
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


def _is_local(place: str) -> bool:
    return Path(place).exists() or place.startswith((".", "/", "bases/"))


def download_patterns(variant: str | None) -> list[str]:
    """Returns which files of a hub repository make a base, as the hub's patterns, in which `*` also matches `/`.

    They are named one by one, since repositories also hold single-file checkpoints, ONNX and OpenVINO exports, a second
    VAE (SDXL's vae_1_0), weights without averaging (SD-V1.5's non_ema) and pickles; together ten times the download.
    """
    patterns = ["model_index.json", "scheduler/*.json", "feature_extractor/*.json"]
    patterns += [f"{part}/*.{kind}" for part in ("tokenizer", "tokenizer_2") for kind in ("json", "txt")]
    for part, stem in WEIGHTS.items():
        # Above the hub's usual size a file comes in shards, `-00001-of-00002`.
        files = (f"{stem}.{variant}", f"{stem}.{variant}-*-of-*") if variant else (stem, f"{stem}-*-of-*")
        patterns += [f"{part}/*.json", *(f"{part}/{file}.safetensors" for file in files)]
    return patterns


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder is not a Stable Diffusion or SDXL pipeline in diffusers' layout, by names."""
    examine.check_parts(folder)


def variant(folder: Path) -> str | None:
    """Returns the variant in which a base's UNet is there, such as fp16; None where there are plain files."""
    stem = WEIGHTS["unet"]
    files = sorted((folder / "unet").glob(f"{stem}*.safetensors"))
    if any(path.name.startswith((f"{stem}.safetensors", f"{stem}-")) for path in files):
        return None
    # diffusion_pytorch_model.fp16.safetensors, or diffusion_pytorch_model.fp16-00001-of-00002.safetensors
    return files[0].name.split(".")[1].partition("-")[0] if files else None


Identity = dict[str, str | None]


def identity(base: Base, folder: Path) -> Identity:
    """Returns what names a base for good: its source, its pinned revision, a digest of all that draws, and under `unet`
    one of its UNet's files alone; with a style, that one's source and weight.

    Raises:
        UserError: the base has a fault (see `examine.examine`).
    """
    style = {"style": f"{base.style.source} at {base.style.weight:g}"} if base.style else {}
    found = examine.examine(folder.name, folder, base.variant)
    return {"source": base.source, "revision": base.revision, "digest": found.digest, "unet": found.unet} | style


def compared(one: Identity, other: Identity) -> tuple[str | None, str | None]:
    """Returns the digests by which two bases are the same or not; None where one is not known.

    Where both tell their UNet's digest apart, those of all that draws. Of an adapter or release from before 2026-11
    `digest` is its UNet's: then UNets are compared.
    """
    if one.get("unet") and other.get("unet"):
        return one.get("digest"), other.get("digest")
    return one.get("unet") or one.get("digest"), other.get("unet") or other.get("digest")


def same_base(one: Identity, other: Identity) -> bool:
    """Returns whether two identities are of one base."""
    mine, theirs = compared(one, other)
    return mine is not None and mine == theirs


def difference(one: Identity, other: Identity) -> str:
    """Returns what a message about two other bases says besides their digests."""
    if one.get("unet") and one.get("unet") == other.get("unet"):
        return "; their UNets are the same, and VAE, text encoders, tokenizers or scheduler are not"
    return ""
