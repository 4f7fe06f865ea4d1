"""A folder of what nobody wants, each with its reason; nothing of it stops the run. Tar files: test_bulk_sources.py."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from lcmlora.data.prepare import DUPLICATE, prepare_pictures
from lcmlora.data.reading import candidates
from lcmlora.data.sources.folder import Folder
from lcmlora.data.sources.source import survey
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture

ROOT = Path(__file__).parents[2]
SMALL = "shorter side under 16 pixels (data.min_side)"
LONG = "longer side over 2 times the shorter (data.max_aspect)"


def encoded(number: int, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture(number, (64, 48)).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *, data: bytes = b"\0", crc: int | None = None, extra: bytes = b"") -> bytes:
    """A PNG that says it has this size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content) if crc is None else crc
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header was changed."""
    content = bytearray(encoded(3, "JPEG"))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def odd_but_good(folder: Path) -> dict[str, tuple[int, int]]:
    """Pictures that are decoded, by name, with their sizes when upright."""
    wide, tall = (64, 48), (48, 64)
    sizes = {}

    def put(name: str, image: Image.Image, size: tuple[int, int] = wide, **options: Any) -> None:
        add(folder, name, f"good {name}", image, **options)
        sizes[name] = size

    for number in range(12):
        put(f"plain-{number:02d}.png", picture(number, wide))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = tall if orientation > 4 else wide
        put(f"turned-{orientation}.jpg", picture(20 + orientation, wide), size, exif=exif)
    put("cmyk.jpg", picture(30, wide).convert("CMYK"))
    put("grey.jpg", picture(31, wide).convert("L"))
    put("deep.png", Image.new("I;16", wide, 40_000))
    put("one-bit.png", picture(32, wide).convert("1"))
    put("palette.png", picture(33, wide).convert("P"))
    put("clear.png", picture(34, wide).convert("RGBA"))
    put("clear-grey.png", picture(35, wide).convert("LA"))
    put("moving.webp", picture(36, wide), save_all=True, append_images=[picture(37, wide)], lossless=True)
    put("moving.png", picture(38, wide), save_all=True, append_images=[picture(39, wide)])
    put("odd-profile.png", picture(40, wide), icc_profile=b"no profile at all")
    put("n" * 200 + ".png", picture(41, wide))
    add(folder, "a-png.jpg", "good wrong ending", encoded(42, "PNG"))
    add(folder, "a-jpg.webp", "good wrong ending too", encoded(43, "JPEG"))
    return sizes | {"a-png.jpg": wide, "a-jpg.webp": wide}


def bad(folder: Path, outside: Path) -> dict[str, str]:
    """What is refused, by name, with the reason."""
    reasons: dict[str, str] = {}

    def put(name: str, reason: str, content: bytes | Image.Image, caption: str | bytes | None = "a caption") -> None:
        path = add(folder, name, None, content)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)
        reasons[name] = reason

    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(50, kind)
        put(f"half.{kind.lower()}", candidates.DAMAGED, whole[: len(whole) // 2])
        put(f"most.{kind.lower()}", candidates.DAMAGED, whole[: len(whole) * 3 // 4])
        put(f"start.{kind.lower()}", candidates.DAMAGED if kind == "JPEG" else candidates.NOT_A_PICTURE, whole[:8])
    for number in range(3):
        put(f"nothing-{number}.png", candidates.EMPTY, b"")
    put("bomb.png", candidates.TOO_LARGE, png(60_000, 60_000))
    put("bomb-wide.png", candidates.TOO_LARGE, png(2**31 - 1, 2))
    put("bomb.jpg", candidates.TOO_LARGE, jpeg_of_size(65_000, 65_000))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (80 << 20), zip=True)
    put("bomb-in-text.png", candidates.DAMAGED, encoded(51, "PNG", pnginfo=text))
    put("checksum.png", candidates.NOT_A_PICTURE, png(64, 48, crc=7))
    put("short.png", candidates.DAMAGED, png(64, 48, data=b"\0" * 9))
    put("text.png", candidates.NOT_A_PICTURE, b"not a picture")
    put("page.jpg", candidates.NOT_A_PICTURE, b"<!doctype html><script>alert(1)</script>")
    put("drawing.png", candidates.NOT_A_PICTURE, b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>')
    put("code.png", candidates.NOT_A_PICTURE, b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run\n")
    put("numbers.png", candidates.NOT_A_PICTURE, b"P6 64 48 255\n" + bytes(64 * 48 * 3))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("a.png", encoded(52, "PNG"))
    put("archive.png", candidates.NOT_A_PICTURE, archive.getvalue())
    for kind, ending in (("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff"), ("JPEG2000", "jp2"), ("TIFF", "png")):
        put(f"other-{kind}.{ending}", candidates.NOT_A_PICTURE, encoded(53, kind))
    put("megabyte.png", candidates.LONG_CAPTION, picture(60), "word " * 200_000)
    put("megabyte-too.png", candidates.LONG_CAPTION, picture(61), b"\xff" * (1 << 20))
    put("latin.png", candidates.NOT_UTF8, picture(62), "caf\xe9".encode("latin-1"))
    put("utf-16.png", candidates.NOT_UTF8, picture(63), "caption".encode("utf-16"))
    put("control.png", candidates.NO_CAPTION, picture(64), b"\x00\x01\x1b\n\t")
    put("markup.png", candidates.NO_CAPTION, picture(65), "<b></b> https://example.org/a.png")
    put("missing.png", candidates.NO_CAPTION, picture(66), None)
    put("missing-too.png", candidates.NO_CAPTION, picture(67), None)
    for number in range(3):
        put(f"same-{number}.png", DUPLICATE, (folder / f"plain-{number:02d}.png").read_bytes())
    put("small.png", SMALL, picture(70, (40, 15)))
    put("speck.png", SMALL, picture(71, (1, 1)))
    put("long.png", LONG, picture(72, (99, 33)))
    put("tall.png", LONG, picture(73, (20, 200)))
    secret = add(outside, "secret.png", "secret", picture(74))
    for name, target in (("link.png", secret), ("passwords.png", Path("/etc/passwd"))):
        (folder / name).symlink_to(target)
        reasons[name] = candidates.LINKED
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")  # which nobody writes to: whoever opens it waits for ever
    reasons |= dict.fromkeys(("loop.png", "gone.png"), candidates.MISSING) | {"pipe.png": candidates.NO_FILE}
    name = os.fsdecode(b"caf\xe9.png")
    add(folder, name, "a caption", picture(75))
    return reasons | {candidates.printable(name): candidates.NOT_UTF8}


def test_a_hostile_folder_costs_each_picture_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    sizes, reasons = odd_but_good(folder), bad(folder, tmp_path / "outside")
    assert len(sizes) + len(reasons) >= 60
    data = data_in(folder)
    found = survey(data)
    records, rejections = found.records, found.rejections
    assert {r.key: (r.width, r.height) for r in records if r.key not in reasons} == sizes
    later = (DUPLICATE, SMALL, LONG)  # found in what could be decoded
    assert {r.name: r.reason for r in rejections} == {n: r for n, r in reasons.items() if r not in later}

    report = prepare_pictures(data, 4, tmp_path / "out")
    assert {reason: found["count"] for reason, found in report["dropped"].items()} == Counter(reasons.values())
    assert report["kept"] == len(sizes)
    assert report["read"] == len(sizes) + len(reasons)
    assert "secret" not in (tmp_path / "out" / "train.jsonl").read_text()


@pytest.mark.slow
def test_no_process_takes_a_gigabyte_for_a_hostile_folder(tmp_path: Path) -> None:
    odd_but_good(tmp_path / "in"), bad(tmp_path / "in", tmp_path / "outside")
    # In a process of its own, whose children are those that read the folder and no other test's. They are children of
    # the fork server: only when that has ended and was waited for are they among those of this process.
    script = (
        "import resource, sys\n"
        "from lcmlora.data.sources.source import survey\n"
        "from tests.data.conftest import data_in\n"
        "from multiprocessing import forkserver; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    survey(data_in(Path(sys.argv[1])))\n"
        "    forkserver._forkserver._stop()\n"
        "    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    (tmp_path / "find.py").write_text(script)
    command = [sys.executable, str(tmp_path / "find.py"), str(tmp_path / "in")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kibibytes = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert 50 << 10 < kibibytes < 1 << 20  # no reader has less than Python with Pillow


def test_where_most_pictures_have_no_caption_the_layout_is_wrong(folder: Path) -> None:
    for number in range(7):
        add(folder, f"bare-{number}.png", None, picture(90 + number))
    assert Counter(r.reason for r in Folder(data_in(folder)).candidates()[1]) == {candidates.NO_CAPTION: 7}
    for number in range(2):
        add(folder, f"barer-{number}.png", None, picture(100 + number))
    with pytest.raises(UserError, match=r"9 of 17 pictures have no caption \(bare-0.png, bare-1.png, bare-2.png, "):
        survey(data_in(folder))
