"""The folder of a base: what it is, and what names the base in it for good."""

from __future__ import annotations

from pathlib import Path

from lcmlora.bases import families
from lcmlora.bases.examination import examine
from lcmlora.config import Base
from lcmlora.errors import UserError


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder is not a pipeline of a known family in diffusers' layout, by names."""
    examine.check_parts(folder)


def variant(folder: Path) -> str | None:
    """Returns the variant in which a base's network is there, such as fp16; None where there are plain files."""
    network = families.of_folder(folder).network
    stem = network.weights
    files = sorted((folder / network.folder).glob(f"{stem}*.safetensors"))
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


def check_same_base(adapter: str, made_for: Identity | None, other: Identity, shown: str) -> None:
    """Raises UserError where an adapter was made for another base, by its digest; unknown ones pass.

    Args:
        adapter: what messages call it.
        other: source and digest of a base.
        shown: how the message goes on to it, such as "this base is".
    """
    made_for = made_for or {}
    mine, theirs = compared(made_for, other)
    if mine and theirs and mine != theirs:
        raise UserError(
            f"{adapter}: was made for {made_for.get('source')} (digest {mine[:12]}...), and {shown} "
            f"{other.get('source')} (digest {theirs[:12]}...){difference(made_for, other)}; if one base is a "
            "fine-tune of the other, go on with --other-base"
        )
