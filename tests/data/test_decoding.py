"""Colour profiles, transparency and depth: what viewers show is what is trained on."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lcmlora.data.decoding import BAD_PROFILE, decode
from lcmlora.data.reading.candidates import LFS_POINTER, Unusable
from tests.data.conftest import picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

# Primaries as ICC profiles have them, adapted to D50.
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def u16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def profile(primaries: Any, *curve: float) -> bytes:
    """A profile of three primaries and one curve: a gamma, or the five numbers of a curve with a straight part."""

    def s15(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    kind = 3 if len(curve) == 5 else 0
    tone = b"para\0\0\0\0" + u16(kind, 0) + b"".join(map(s15, curve))
    text = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", 4, 28) + "ab".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": xyz((0.9642, 1, 0.8249))}
    if primaries:
        tags |= {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone)
    else:
        tags[b"kTRC"] = tone
    table, content, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">IIII", 128 + len(table) + len(content), 0, 0x04300000, 0)[:12] + b"mntr" + space + b"XYZ "
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + table + content


P3, ADOBE = profile(DISPLAY_P3, *SRGB_CURVE), profile(ADOBE_RGB, 2.2)
GREY = profile(None, 1.8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image, note = decode(content)
    assert (image.mode, note) == ("RGB", None)
    return np.asarray(image).astype(int)


def shown(image: Image.Image, icc: bytes) -> np.ndarray:
    """As a viewer shows it."""
    converted = ImageCms.profileToProfile(image, io.BytesIO(icc), ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(converted).astype(int)


@pytest.mark.parametrize("icc", [P3, ADOBE])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colours_of_a_wide_profile_are_converted(icc: bytes, kind: str) -> None:
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    plain = Image.new("RGB", (16, 16), (60, 200, 90))
    found = pixels(encoded(plain, kind, icc_profile=icc, **options))
    assert np.abs(found - shown(plain, icc)).max() <= 3
    assert np.abs(found - np.asarray(plain)).max() > 20


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_srgbs_own_profile_changes_no_bit(mode: str) -> None:
    image = picture(7).convert(mode)
    assert np.array_equal(pixels(encoded(image, icc_profile=SRGB)), pixels(encoded(image)))


def test_a_profile_of_grey_is_converted() -> None:
    grey = Image.new("L", (16, 16), 100)
    assert np.abs(pixels(encoded(grey, icc_profile=GREY)) - shown(grey, GREY)).max() <= 1
    assert pixels(encoded(grey, icc_profile=GREY))[0, 0, 0] > 105
    assert pixels(encoded(grey, icc_profile=P3))[0, 0].tolist() == [100, 100, 100]  # of colours, with sRGB's curve


def test_transparency_and_palettes_take_part_in_the_conversion() -> None:
    clear = Image.new("RGBA", (16, 16), (60, 200, 90, 255))
    clear.paste((1, 2, 3, 0), (0, 0, 8, 16))
    found = pixels(encoded(clear, icc_profile=P3))
    assert found[0, 0].tolist() == [255] * 3
    assert np.abs(found[0, 15] - shown(Image.new("RGB", (1, 1), (60, 200, 90)), P3)[0, 0]).max() <= 1
    palette = Image.new("RGB", (16, 16), (60, 200, 90)).quantize(2)
    assert np.abs(pixels(encoded(palette, icc_profile=P3))[0, 0] - found[0, 15]).max() <= 2


@pytest.mark.parametrize("icc", [b"broken", b"\0" * 200, P3[:100], GREY])
def test_a_profile_that_is_broken_or_of_another_kind_is_told_and_left(icc: bytes) -> None:
    image = picture(3)
    found, note = decode(encoded(image, icc_profile=icc))
    assert note == BAD_PROFILE
    assert np.array_equal(np.asarray(found), np.asarray(image))


# --- transparency and depth


def png(bits: int, colour: int, row: bytes, key: bytes = b"", width: int = 48) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 4, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + (chunk(b"tRNS", key) if key else b"") + body


WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        (png(16, 0, u16(2570) * 24 + u16(30000) * 24, u16(2570)), WHITE, [117] * 3),
        (png(16, 0, u16(2570) * 24 + u16(2571) * 24, u16(2570)), WHITE, [10] * 3),
        (png(8, 0, b"\x0a" * 24 + b"\x0b" * 24, u16(10)), WHITE, [11] * 3),
        (png(4, 0, b"\x55" * 12 + b"\x33" * 12, u16(5)), WHITE, [51] * 3),
        (png(2, 0, b"\x55" * 6 + b"\x00" * 6, u16(1)), WHITE, [0] * 3),
        (png(1, 0, b"\x00" * 3 + b"\xff" * 3, u16(0)), WHITE, WHITE),
        (png(1, 0, b"\xff" * 3 + b"\x00" * 3, u16(1)), WHITE, [0] * 3),
        (png(8, 2, b"\xff\0\xff" * 24 + b"\0\0\0" * 24, u16(255, 0, 255)), WHITE, [0] * 3),
        (png(16, 2, u16(9000, 800, 70) * 24 + b"\0" * 144, u16(9000, 800, 70)), WHITE, [0] * 3),
        (png(16, 4, u16(2570, 0) * 24 + u16(2570, 65535) * 24), WHITE, [10] * 3),
        (png(16, 6, u16(9, 9, 9, 0) * 24 + u16(0, 0, 0, 65535) * 24), WHITE, [0] * 3),
    ],
)  # fmt: skip
def test_what_is_clear_is_white_at_every_depth(content: bytes, left: list[int], right: list[int]) -> None:
    found = pixels(content)
    assert [found[0, 8].tolist(), found[0, 40].tolist()] == [left, right]


def test_a_palette_with_a_value_of_transparency_for_each_colour() -> None:
    palette = Image.new("P", (48, 4), 1)
    palette.putpalette([255, 0, 255, 0, 0, 0])
    palette.paste(0, (0, 0, 24, 4))
    found = pixels(encoded(palette, transparency=bytes([0, 255])))
    assert [found[0, 8].tolist(), found[0, 40].tolist()] == [WHITE, [0, 0, 0]]


def test_cmyk_of_a_printer_is_not_inverted() -> None:
    found = pixels(encoded(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(found[8, 8] - [200, 30, 30]).max() < 12


def test_stereo_pictures_and_gain_maps_give_their_first_frame() -> None:
    first, second = picture(1, (64, 48)), picture(2, (32, 24)).convert("L").convert("RGB")
    content = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    found, note = decode(content)
    assert (found.size, note) == ((64, 48), None)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(first)).mean() < 4
    film = encoded(first, "JPEG", quality=95) + b"\0\0\0\x18ftypmp42" + b"x" * 5000
    assert decode(film)[0].size == (64, 48)


def test_a_pointer_of_git_lfs_is_named() -> None:
    with pytest.raises(Unusable, match=LFS_POINTER):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
