"""Decodes a picture from untrusted bytes to sRGB pixels."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lcmlora.data.reading.candidates import DAMAGED, LFS_POINTER, NOT_A_PICTURE, TOO_LARGE, Unusable

BAD_PROFILE = "its colour profile cannot be used; taken as sRGB"

_FORMATS = ("JPEG", "PNG", "WEBP")  # every further decoder of Pillow is a further way in for hostile files
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
_SPACES = {"RGB": "RGB ", "CMYK": "CMYK", "L": "GRAY"}  # of a profile, by the mode of the pictures that it is for
_ROUNDING = 2  # of 255: how far rounding moves colours under sRGB's own profile


def decode(content: bytes) -> tuple[Image.Image, str | None]:
    """Returns the picture in RGB, and a note if part of it could not be used.

    The picture is upright, its colours are converted to sRGB, transparent pixels are blended with white, and of an
    animation it is the first frame.

    Raises:
        Unusable: it is no picture, it is damaged, or it has too many pixels.
    """
    try:
        # Reads the size and refuses bombs; no pixels yet.
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            key = _colour_key(opened, content)
            return _to_rgb(ImageOps.exif_transpose(opened), key)
    except UnidentifiedImageError:
        raise Unusable(LFS_POINTER if content.startswith(_LFS_HEADER) else NOT_A_PICTURE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise Unusable(TOO_LARGE) from None
    except Exception:  # decoders raise whatever broken bytes lead them to
        raise Unusable(DAMAGED) from None


def _colour_key(picture: Image.Image, content: bytes) -> int | tuple[int, ...] | None:
    """Returns the value that a PNG declares transparent (tRNS), in the scale of the pixels that Pillow has read.

    Pillow scales the pixels to 8 bits, and leaves this value in the depth of the file.
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
    alpha: Image.Image | None = None  # 0 where the picture is transparent
    if picture.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255 instead of scaling
        values = np.asarray(picture).astype(np.uint32)
        if key is not None:
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif key is not None:
        picture.info["transparency"] = key
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    picture, note = _to_srgb(picture, profile) if profile else (picture, None)
    if alpha is None:
        return picture.convert("RGB"), note
    picture = picture.convert("RGBA")
    picture.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"), note


def _to_srgb(picture: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    """Returns the picture in sRGB without alpha, and a note if its profile cannot be used."""
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
    """Returns the conversion of pictures of this mode to sRGB; None if it changes no colour visibly.

    Raises:
        ImageCms.PyCMSError, OSError: the profile is broken.
        ValueError: the profile is for pictures of another colour space.
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
    return conversion if np.abs(moved).max() > _ROUNDING else None


def _probe() -> Image.Image:
    """Returns 6 x 6 x 6 colours, evenly spaced, as a picture of 6 x 36 pixels."""
    levels = np.linspace(0, 255, 6).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(36, 6, 3))
