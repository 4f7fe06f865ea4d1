"""A base by its folder: its layout, variant and identity, and the comparison of identities."""

from __future__ import annotations

from pathlib import Path

from lcmlora.bases import families
from lcmlora.bases.examination.examine import check_parts, examine_base
from lcmlora.config import Base
from lcmlora.errors import UserError


def check_folder(folder: Path) -> None:
    """Raises UserError if the folder is not a pipeline of a known family in diffusers' layout, by file names alone."""
    check_parts(folder)


def variant(folder: Path) -> str | None:
    """Returns the variant of a base's network, such as fp16; None if its files are plain."""
    network = families.of_folder(folder).network
    stem = network.weights
    files = sorted((folder / network.folder).glob(f"{stem}*.safetensors"))
    if any(path.name.startswith((f"{stem}.safetensors", f"{stem}-")) for path in files):
        return None
    # diffusion_pytorch_model.fp16.safetensors, or diffusion_pytorch_model.fp16-00001-of-00002.safetensors
    return files[0].name.split(".")[1].partition("-")[0] if files else None


# source; revision, None of a local base; digest, of all parts that draw; unet, of the UNet's files alone; and style, if
# the base has one: its source and weight.
Identity = dict[str, str | None]


def identity(base: Base, folder: Path) -> Identity:
    """Returns the identity of a base.

    Raises:
        UserError: the base has a fault (see `examine_base`).
    """
    style = {"style": f"{base.style.source} at {base.style.weight:g}"} if base.style else {}
    examined = examine_base(folder.name, folder, base.variant)
    digests = {"digest": examined.digest, "unet": examined.unet_digest}
    return {"source": base.source, "revision": base.revision} | digests | style


def comparable_digests(one: Identity, other: Identity) -> tuple[str | None, str | None]:
    """Returns the digests by which two bases are compared; None if an identity has none.

    If both have a UNet's digest, these are the digests of all parts. In adapters and releases from before 2026-11
    `digest` is the UNet's; then the UNets are compared.
    """
    if one.get("unet") and other.get("unet"):
        return one.get("digest"), other.get("digest")
    return one.get("unet") or one.get("digest"), other.get("unet") or other.get("digest")


def same_base(one: Identity, other: Identity) -> bool:
    """Returns whether two identities are of the same base; False if a digest is unknown."""
    digest, others = comparable_digests(one, other)
    return digest is not None and digest == others


def difference(one: Identity, other: Identity) -> str:
    """Returns the end of an error about two different bases: which parts differ, if that is known."""
    if one.get("unet") and one.get("unet") == other.get("unet"):
        return "; their UNets are the same, and VAE, text encoders, tokenizers or scheduler are not"
    return ""


def check_same_base(adapter: str, made_for: Identity | None, base: Identity, subject: str) -> None:
    """Raises UserError if an adapter was made for another base, by their digests. Unknown digests pass.

    Args:
        adapter: the adapter's name in the error.
        made_for: the identity of the base that the adapter was made for; None if it is unknown.
        base: the identity of the base that the adapter is used with.
        subject: the words before that base's source in the error, such as "this base is".
    """
    made_for = made_for or {}
    adapters, bases = comparable_digests(made_for, base)
    if adapters and bases and adapters != bases:
        raise UserError(
            f"{adapter}: was made for {made_for.get('source')} (digest {adapters[:12]}...), and {subject} "
            f"{base.get('source')} (digest {bases[:12]}...){difference(made_for, base)}; if one base is a fine-tune of "
            "the other, go on with --other-base"
        )
