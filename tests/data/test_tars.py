"""Samples of tar files: which caption belongs to which picture; and headers that lie."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from lcmlora.data.reading import tar_members, tar_samples
from lcmlora.data.reading.candidates import LONG_CAPTION, NO_CAPTION, NOT_UTF8, UNREADABLE, Candidate, Unusable
from lcmlora.data.reading.tar_members import Member, read_members
from lcmlora.data.sources import tars
from lcmlora.data.sources.tars import Tars
from tests.data.conftest import data_in

PICTURE = b"not looked at here"


def packed(*files: tuple[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def told(path: Path, name: str = "a.tar") -> dict[str, str]:
    """The caption of each picture, or why it is refused."""
    position: tars._Position | None = tars._Position(str(path), name)
    found, alone = {}, tars._UnmatchedParts()
    while position is not None:
        piece = tars._read_piece((), position)
        assert piece.rest != position
        for each in piece.results:
            if isinstance(each, tars._Unmatched):
                alone.add(each)
            else:
                found[each.key if isinstance(each, Candidate) else each.name] = each
        position = piece.rest
    found |= {each.name: each for each in alone.rejections()}
    return {
        key.removeprefix(f"{name}/"): each.caption.text if isinstance(each, Candidate) else each.reason
        for key, each in found.items()
    }


def of(tmp_path: Path, *names: str, **contents: bytes) -> dict[str, str]:
    """What becomes of members that are pictures, or captions that say their own names."""
    files = [(name, contents.get(name.replace(".", "_"), name.encode())) for name in names]
    (tmp_path / "a.tar").write_bytes(packed(*files))
    return told(tmp_path)


JSON = json.dumps({"caption": None, "text": " ", "TEXT": "json"}).encode()


@pytest.mark.parametrize(
    "names",
    [
        ("1.jpg", "1.json", "1.txt"),
        ("1.json", "1.jpg", "1.txt"),
        ("1.txt", "1.json", "1.jpg"),
        ("1.caption", "1.json", "1.text", "1.txt", "1.jpg"),
    ],
)
def test_a_txt_counts_before_a_json_in_whatever_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    found = of(tmp_path, *names, **{"1_json": JSON})
    assert found == {"1.jpg": "1.txt"}


@pytest.mark.parametrize("ending", ["text", "caption", "TXT", "Caption"])
def test_other_endings_of_captions_are_read(tmp_path: Path, ending: str) -> None:
    assert of(tmp_path, f"1.{ending}", "1.json", "1.JPG", **{"1_json": JSON}) == {"1.JPG": f"1.{ending}"}


def test_an_empty_txt_leaves_the_caption_to_the_next_file_that_has_one(tmp_path: Path) -> None:
    assert of(tmp_path, "1.jpg", "1.json", "1.txt", **{"1_json": JSON, "1_txt": b" \n"}) == {"1.jpg": "json"}
    assert of(tmp_path, "1.jpg", "1.caption", "1.txt", **{"1_txt": b""}) == {"1.jpg": "1.caption"}


def test_a_damaged_caption_costs_its_own_picture(tmp_path: Path) -> None:
    contents = {"1_txt": b"caf\xe9", "2_txt": b"x" * 70_000, "3_json": b'{"caption"', "4_json": b'{"caption": NaN}',
                "5_json": b'{"caption": "five", "similarity": NaN}', "6_json": b"[]"}  # fmt: skip
    names = [name for n in range(1, 3) for name in (f"{n}.jpg", f"{n}.txt")]
    names += [name for n in range(3, 7) for name in (f"{n}.jpg", f"{n}.json")]
    assert of(tmp_path, *names, **contents) == {
        "1.jpg": NOT_UTF8, "2.jpg": LONG_CAPTION, "3.jpg": tar_samples.BAD_JSON, "4.jpg": NO_CAPTION, "5.jpg": "five",
        "6.jpg": NO_CAPTION,
    }  # fmt: skip


def test_names_with_dots_keep_their_own_captions(tmp_path: Path) -> None:
    names = ["./v1.0/2021.05.png", "./v1.0/2021.05.txt", "./v1.0/2021.06.png", "./v1.0/2021.07.png",
             "./v1.0/2021.07.txt", "./v1.0/2021.08.txt"]  # fmt: skip
    for shuffled in (names, names[::-1], names[::2] + names[1::2]):
        assert of(tmp_path, *shuffled) == {
            "./v1.0/2021.05.png": "./v1.0/2021.05.txt",
            "./v1.0/2021.06.png": NO_CAPTION,
            "./v1.0/2021.07.png": "./v1.0/2021.07.txt",
            "./v1.0/2021.08": tars.NO_PICTURE,
        }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.image.jpg", "1.txt"], {"1.image.jpg": "1.txt"}),
        (["1.jpg", "1.caption.txt"], {"1.jpg": "1.caption.txt"}),
        (["1.image.png", "1.prompt.txt", "1.cls"], {"1.image.png": "1.prompt.txt"}),
        (["1.jpg", "1.en.txt", "1.txt", "1.alt.txt"], {"1.jpg": "1.txt"}),
        (["1.jpg", "1.en.txt", "1.caption.txt"], {"1.jpg": "1.caption.txt"}),
        # What is behind the first dot says which picture it is: these are two.
        (["2021.05.png", "2021.06.txt"], {"2021.05.png": NO_CAPTION, "2021.06": tars.NO_PICTURE}),
        (["2021.png", "2021.06.txt"], {"2021.png": NO_CAPTION, "2021.06": tars.NO_PICTURE}),
        (
            ["1.left.jpg", "1.right.jpg", "1.txt"],
            {"1.left.jpg": tar_samples.AMBIGUOUS_CAPTION, "1.right.jpg": tar_samples.AMBIGUOUS_CAPTION},
        ),
        (["1.jpg", "1.jpg.txt", "1.png", "1.png.txt"], {"1.jpg": "1.jpg.txt", "1.png": "1.png.txt"}),
        (
            ["2021.05.png", "2021.05.png.txt", "2021.06.png"],
            {"2021.05.png": "2021.05.png.txt", "2021.06.png": NO_CAPTION},
        ),
        (["1.jpg", "1.png", "1.txt"], {"1.jpg": "1.txt", "1.png": "1.txt"}),
    ],
)
def test_a_caption_without_a_picture_of_its_name_goes_to_the_only_one(
    tmp_path: Path, names: list[str], expected: dict[str, str]
) -> None:
    assert of(tmp_path, *names) == expected
    assert of(tmp_path, *reversed(names)) == expected


def test_maps_beside_a_picture_are_not_trained_on(tmp_path: Path) -> None:
    maps = [
        "depth",
        "mask",
        "seg",
        "canny",
        "pose",
        "normal",
        "alpha",
        "depth_midas",
        "seg0",
        "Mask",
        "conditioning_image",
    ]
    names = [f"x.{each}.png" for each in maps]
    expected = dict.fromkeys(names, tar_samples.AUXILIARY) | {"x.jpg": "x.txt"}
    assert of(tmp_path, *names, "x.jpg", "x.txt") == expected
    assert of(tmp_path, "x.txt", "x.jpg", *names) == expected
    assert of(tmp_path, *names) == dict.fromkeys(names, tar_samples.AUXILIARY)
    # One with a caption of its own is a picture, and a name without a second dot says nothing of the kind.
    names = ["my mask.png", "my mask.txt", "v2.a mask.png", "v2.a mask.txt", "y.normal.png", "y.normal.txt"]
    assert of(tmp_path, *names) == {
        "my mask.png": "my mask.txt", "v2.a mask.png": "v2.a mask.txt", "y.normal.png": "y.normal.txt",
    }  # fmt: skip


def test_files_of_a_sample_that_are_not_together_are_told_with_how_to_sort_them(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(3)] + [f"{n}.txt" for n in range(1, 4)]
    apart = {"1.jpg": tars.CAPTION_ELSEWHERE, "2.jpg": tars.CAPTION_ELSEWHERE}
    assert of(tmp_path, *names) == {"0.jpg": NO_CAPTION, **apart, "3": tars.NO_PICTURE}
    assert "--sort=name" in tars.CAPTION_ELSEWHERE


def test_what_macos_puts_between_files_does_not_part_them(tmp_path: Path) -> None:
    names = ["._1.jpg", "1.jpg", "._1.txt", "1.txt", ".DS_Store", "._2.jpg", "2.jpg", "._2.txt", "2.txt"]
    assert of(tmp_path, *names) == {"1.jpg": "1.txt", "2.jpg": "2.txt"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_as_tarfile_reads_them(tmp_path: Path, format: int) -> None:
    folder = "f" * 90 + "/" + "é" * 80
    content = packed((f"{folder}/1.jpg", PICTURE), (f"{folder}/1.txt", b"one"), ("x/2.jpg", PICTURE), format=format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.offset, m.size) for m in read_members(io.BytesIO(content))] == expected


def test_tar_files_one_behind_the_other_are_all_read(tmp_path: Path) -> None:
    one, two = packed(("1.jpg", PICTURE), ("1.txt", b"one")), packed(("2.jpg", PICTURE), ("2.txt", b"two"))
    (tmp_path / "a.tar").write_bytes(one + two + b"\0" * 20_000)
    assert told(tmp_path) == {"1.jpg": "one", "2.jpg": "two"}
    (tmp_path / "a.tar").write_bytes(one + b"\0" * 20_000 + b"else" * 200)
    assert told(tmp_path) == {"1.jpg": "one", "a.tar": tar_members.TRAILING_DATA}


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, raw_size: bytes | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if raw_size is not None:
        block[124:136] = raw_size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def block(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 512)


LIES = {
    "a size below zero": header("x.jpg", 0, raw_size=b"\xff" * 12),
    "a size that leads back": header("x.jpg", 0, raw_size=(-1024 % (1 << 95)).to_bytes(12, "big")),
    "more than the file has": header("x.jpg", 1 << 40),
    "a long name of gigabytes": header("././@LongLink", 2 << 30, tarfile.GNUTYPE_LONGNAME) + b"x" * 512,
    "long names for ever": (header("././@LongLink", 9, tarfile.GNUTYPE_LONGNAME) + block(b"x.jpg\0")) * 50,
    "PAX records for ever": (header("pax", 12, tarfile.XHDTYPE) + block(b"12 path=x.j\n")) * 50,
    "a PAX size below zero": header("pax", 11, tarfile.XHDTYPE) + block(b"11 size=-9\n") + header("x.jpg", 0),
    "a PAX size of thousands of digits": header("pax", 4011, tarfile.XHDTYPE)
    + block(b"4011 size=" + b"9" * 4000 + b"\n")
    + header("x.jpg", 0),
    "a PAX record of no length": header("pax", 9, tarfile.XHDTYPE) + block(b"0 path=x\n") + header("x.jpg", 0),
    "a PAX record longer than its header": header("pax", 9, tarfile.XHDTYPE)
    + block(b"999 a=bc\n")
    + header("x.jpg", 0),
    "digits that stall an expression": header("pax", 900_000, tarfile.XHDTYPE) + block(b"1" * 900_000) + header("x", 0),
    "a PAX header of gigabytes": header("pax", 4 << 30, tarfile.XHDTYPE),
    "no checksum": b"x.jpg".ljust(512, b"\0"),
    "a sparse file without end": header("x.jpg", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + b"\0" * 29,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_costs_what_is_behind_it(tmp_path: Path, lie: str) -> None:
    good = packed(("1.jpg", PICTURE), ("1.txt", b"one"))[:2048]
    (tmp_path / "a.tar").write_bytes(good + LIES[lie] + packed(("2.jpg", PICTURE), ("2.txt", b"two")))
    assert told(tmp_path) == {"1.jpg": "one", "a.tar": tar_members.CUT_OFF}


def test_a_file_of_headers_alone_is_read_once(tmp_path: Path) -> None:
    content = header("1.jpg", 0) * 24 + bytes(1024)
    assert len(list(read_members(io.BytesIO(content)))) == 24


def test_what_is_no_file_is_never_one(tmp_path: Path) -> None:
    content = b"".join(
        header(f"{number}.jpg", 1024 if kind == tarfile.GNUTYPE_SPARSE else 0, kind)
        + block(b"x" * 600) * (kind == b"S")
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"))
    )
    pax = header("pax", 30, tarfile.XHDTYPE) + block(b"22 GNU.sparse.major=1\n") + header("9.jpg", 0)
    (tmp_path / "a.tar").write_bytes(content + pax + bytes(1024))
    assert told(tmp_path) == {f"{number}.jpg": tars.NO_FILE for number in (0, 1, 2, 3, 4, 9)}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_file_is_told_to_be_one(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("1.jpg"))
    assert told(tmp_path) == {"a.tar": tar_members.COMPRESSED}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert told(tmp_path) == {"a.tar": UNREADABLE}


def test_a_tar_file_is_the_same_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for n in range(30) for name in (f"{n}.jpg", f"{n}.txt")]
    names += [name for n in range(30) for name in (f"9.{n}.jpg", f"9.{n}.txt")]
    whole = of(tmp_path, *names)
    assert whole == {name: name.replace("jpg", "txt") for name in names[::2]}
    for pictures, members_ in ((1, 100_000), (7, 100_000), (7, 8)):
        monkeypatch.setattr(tars, "_PIECE_PICTURES", pictures)
        monkeypatch.setattr(tars, "_MAX_SAMPLE", members_)
        assert told(tmp_path) == whole


def test_a_name_that_stands_twice_counts_once(tmp_path: Path) -> None:
    twice = [
        ("1.jpg", PICTURE),
        ("1.txt", b"one"),
        ("2.jpg", PICTURE),
        ("2.txt", b"two"),
        ("1.jpg", b"new"),
        ("1.txt", b"x"),
    ]
    (tmp_path / "a.tar").write_bytes(packed(*twice))
    found, rejections = Tars(data_in(tmp_path, source="webdataset")).candidates()
    assert {each.key: each.caption.text for each in found} == {"a.tar/1.jpg": "one", "a.tar/2.jpg": "two"}
    assert [(each.name, each.reason) for each in rejections] == [("a.tar/1.jpg", tars.SECOND_PICTURE)]


def test_a_sample_of_very_many_members_is_sorted_out_in_one_go(tmp_path: Path) -> None:
    pictures = [Member(f"1.{n}.jpg", 0, 0, 1, True) for n in range(20_000)]
    texts = [Member(f"1.a{n}.txt", 0, 0, 1, True) for n in range(20_000)]
    found = tar_samples.match_captions("1", [*pictures, *texts], lambda member: b"text", scores=False)
    assert len(found.refused) == len(found.bare_captions) == 20_000


def test_a_member_whose_headers_never_end_is_refused() -> None:
    with pytest.raises(Unusable, match=tar_members.CUT_OFF):
        list(read_members(io.BytesIO(LIES["long names for ever"])))
