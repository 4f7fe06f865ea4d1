"""The folder of a base: brought here, checked, and named for good."""

from __future__ import annotations

import shutil
from pathlib import Path

from lcmlora import singlefile
from lcmlora.config import Base
from lcmlora.errors import Unavailable, UserError
from lcmlora.files import sha256_folder

# The parts with weights, and how their files are called.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def fetch(name: str, base: Base, root: Path = Path("bases")) -> Path:
    """Puts the base at `root/name` and returns that folder.

    A hub id is downloaded at its revision, a local folder linked, a single-file checkpoint converted. Idempotent; a
    changed revision or variant downloads again, a changed file is converted again. With a style the folder is a copy
    that has it in its UNet, and the plain base is at `root/.plain/name`.

    Raises:
        UserError: a hub id without revision, a folder without the parts of a pipeline, a file that is no checkpoint
            of this family, or what the hub does not know or does not let this user have.
        Unavailable: the hub does not answer.
    """
    target = root / name
    from lcmlora import styled

    if base.style is None and (target / styled.MARKER).is_file():
        shutil.rmtree(target)
    if base.style is not None:
        styled.make(name, base, fetch(name, base.model_copy(update={"style": None}), root / ".plain"), target)
        return target
    source = Path(base.source)
    if singlefile.names_a_file(base.source):
        if base.config is not None and _is_local(base.config):
            check_folder(Path(base.config))
        singlefile.convert(name, base, target)
        check_folder(target)
        return target
    if _is_local(base.source):
        check_folder(source)
        if source.resolve() != target.resolve():
            root.mkdir(parents=True, exist_ok=True)
            if target.is_symlink():
                target.unlink()
            if target.exists():
                raise UserError(f"{target} is in the way of the link to {source}; move it or rename the base")
            target.symlink_to(source.resolve(), target_is_directory=True)
        return target
    if base.revision is None:
        raise UserError(
            f"bases.{name}.revision: {base.source} is a hub id and needs a pinned commit to be reproducible"
        )
    marker = target / ".revision"
    wanted = f"{base.source}@{base.revision} {base.variant or ''}\n"
    if marker.is_file() and marker.read_text() == wanted:
        return target
    if target.is_symlink():  # the base was a folder before, into which nothing must be downloaded
        target.unlink()
    elif (target / singlefile.MARKER).is_file():
        shutil.rmtree(target)
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
    check_folder(target)
    marker.write_text(wanted)
    return target


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
    """Raises UserError where the folder is not a Stable Diffusion or SDXL pipeline in diffusers' layout."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such base folder")
    for part in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler", "tokenizer", "text_encoder"):
        if not (folder / part).exists():
            missing = part.split("/")[0]
            shown = f"{missing}/" if missing != "model_index.json" else missing
            raise UserError(f"{folder}: a diffusers base needs {shown}, and there is none")


def variant(folder: Path) -> str | None:
    """Returns the variant in which a base's UNet is there, such as fp16; None for plain files."""
    files = sorted((folder / "unet").glob("diffusion_pytorch_model*.safetensors"))
    # diffusion_pytorch_model.fp16.safetensors, or diffusion_pytorch_model.fp16-00001-of-00002.safetensors
    return files[0].name.split(".")[1].partition("-")[0] if files and files[0].name.count(".") > 1 else None


def identity(base: Base, folder: Path) -> dict[str, str | None]:
    """Returns what names a base for good: its source, its pinned revision and a digest of its UNet's files; with a
    style, that one's source and weight."""
    style = {"style": f"{base.style.source} at {base.style.weight:g}"} if base.style else {}
    return {"source": base.source, "revision": base.revision, "digest": sha256_folder(folder / "unet")} | style
