"""Bytes of a picture that nobody vouches for -> pixels in sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lcmlora.data.reading.candidates import DAMAGED, LFS, NOT_A_PICTURE, TOO_LARGE, Unusable

BAD_PROFILE = "its colour profile cannot be used; taken as sRGB"

_FORMATS = ("JPEG", "PNG", "WEBP")  # every further decoder of Pillow is a further way in for hostile files
_POINTER = b"version https://git-lfs.github.com/spec/"
_SPACES = {"RGB": "RGB ", "CMYK": "CMYK", "L": "GRAY"}  # of a profile, by the mode of the pictures that it is for
_SAME = 2  # of 255: what rounding makes of sRGB's own profile


def decode(content: bytes) -> tuple[Image.Image, str | None]:
    """Returns the picture in RGB, upright, its colours converted to sRGB, alpha over white; of an animation the first
    frame; and what of it could not be read.

    Raises:
        Unusable: it is none, it is damaged, or it has too many pixels.
    """
    try:
        # Reads the size and refuses bombs; no pixels yet.
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            key = _colour_key(opened, content)
            return _to_rgb(ImageOps.exif_transpose(opened), key)
    except UnidentifiedImageError:
        raise Unusable(LFS if content.startswith(_POINTER) else NOT_A_PICTURE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise Unusable(TOO_LARGE) from None
    except Exception:  # decoders raise whatever broken bytes lead them to
        raise Unusable(DAMAGED) from None


def _colour_key(picture: Image.Image, content: bytes) -> int | tuple[int, ...] | None:
    """Returns the value that a PNG declares clear (tRNS), as its pixels have it once Pillow has read them.

    Pillow leaves the key in the depth of the file while it scales the pixels to 8 bits.
    """
    key = picture.info.get("transparency")
    if picture.format != "PNG" or key is None or isinstance(key, bytes):
        return None
    depth, colour = content[24], content[25]  # of IHDR, which is always first
    if colour == 0:
        most = (1 << depth) - 1
        return (key & most) * 255 // most if depth < 8 else key
    if colour == 2 and depth == 16:
        return tuple(each >> 8 for each in key)
    return None


def _to_rgb(picture: Image.Image, key: int | tuple[int, ...] | None) -> tuple[Image.Image, str | None]:
    profile = picture.info.get("icc_profile")
    clear: Image.Image | None = None  # a mask of what is not
    if picture.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255 instead of scaling
        values = np.asarray(picture).astype(np.uint32)
        if key is not None:
            clear = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif key is not None:
        picture.info["transparency"] = key
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        clear = picture.getchannel("A")
    picture, note = _to_srgb(picture, profile) if profile else (picture, None)
    if clear is None:
        return picture.convert("RGB"), note
    picture = picture.convert("RGBA")
    picture.putalpha(clear)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"), note


def _to_srgb(picture: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    """Returns the picture without its alpha in sRGB, or as it is where the profile says nothing else."""
    if picture.mode in ("1", "P", "RGBA", "RGBX", "PA", "LA", "La", "RGBa"):
        picture = picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")
    try:
        conversion = _conversion(profile, picture.mode)
        if conversion is None:
            return picture, None
        if conversion.input_mode != picture.mode:  # grey pixels with a profile of colours
            picture = picture.convert(conversion.input_mode)
        return conversion.apply(picture), None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return picture, BAD_PROFILE


@lru_cache(16)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns what converts pictures of this mode to sRGB; None where that changes nothing that can be seen.

    Raises:
        ImageCms.PyCMSError, OSError: the profile is broken.
        ValueError: it is for pictures of another kind.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space
    if mode == "L" and space == "RGB ":
        mode = "RGB"
    if space != _SPACES.get(mode):
        raise ValueError(f"a profile of {space} for {mode}")
    conversion = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return conversion
    probe = _probe().convert(mode)
    moved = np.asarray(conversion.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return conversion if np.abs(moved).max() > _SAME else None


def _probe() -> Image.Image:
    """Returns 6 x 6 x 6 colours, evenly spread."""
    levels = np.linspace(0, 255, 6).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(36, 6, 3))
