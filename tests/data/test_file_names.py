"""Names in metadata that another system or program wrote."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from lcmlora.data.reading.candidates import AMBIGUOUS, MISSING, NAMED_TWICE, OUTSIDE, Unusable
from lcmlora.data.reading.file_names import FileNames
from lcmlora.data.sources.folder import Folder
from tests.data.conftest import add, data_in, picture

ROOT = "/data/my pictures"
THERE = [
    "images/IMG_1.JPG",
    "images/a b.png",
    "100%.png",
    "x%20y.png",
    "caf\u00e9.png",
    "it's.png",
    "a\\b.png",
    "sub/s.png",
]


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("images/IMG_1.JPG", "images/IMG_1.JPG"),
        ("./images/./IMG_1.JPG", "images/IMG_1.JPG"),
        ("images\\IMG_1.JPG", "images/IMG_1.JPG"),
        (".\\images\\IMG_1.JPG", "images/IMG_1.JPG"),
        ("images/img_1.jpg", "images/IMG_1.JPG"),
        (" images/IMG_1.JPG\r", "images/IMG_1.JPG"),
        ('"images/IMG_1.JPG"', "images/IMG_1.JPG"),
        ("images/a%20b.png", "images/a b.png"),
        ("file:///data/my%20pictures/images/a%20b.png", "images/a b.png"),
        ("/data/my pictures/images/IMG_1.JPG", "images/IMG_1.JPG"),
        ("/home/other/my pictures/images/IMG_1.JPG", "images/IMG_1.JPG"),  # of the same folder, before it was moved
        ("C:\\Users\\me\\My Pictures\\images\\IMG_1.JPG", "images/IMG_1.JPG"),
        ("sub/../sub/s.png", "sub/s.png"),
        ("100%.png", "100%.png"),
        ("x%20y.png", "x%20y.png"),
        ("x y.png", "x%20y.png"),
        (unicodedata.normalize("NFD", "caf\u00e9.png"), "caf\u00e9.png"),
        ("CAF\u00c9.PNG", "caf\u00e9.png"),
        ("a\\b.png", "a\\b.png"),
        ("it's.png", "it's.png"),
    ],
)
def test_a_name_that_is_written_otherwise_means_the_one_file_that_is_like_it(named: str, meant: str) -> None:
    assert FileNames(THERE, ROOT).find(named) == meant


def test_a_name_in_metadata_of_a_subfolder_is_of_that_folder() -> None:
    names = FileNames(THERE, ROOT)
    assert names.find("img_1.jpg", "images") == "images/IMG_1.JPG"
    assert names.find("..\\sub\\S.png", "images") == "sub/s.png"
    assert names.find(f"{ROOT}/sub/s.png", "images") == "sub/s.png"


@pytest.mark.parametrize(
    ("named", "reason", "detail"),
    [
        ("A.PNG", AMBIGUOUS, "could be A.png or a.png"),
        ("a.jpg", MISSING, "the nearest is A.png"),
        ("cat-001.png", MISSING, "the nearest is cat-0001.png"),
        ("nothing like it.png", MISSING, ""),
        ("../a.png", OUTSIDE, "the nearest is A.png"),
        ("/etc/passwd", OUTSIDE, ""),
        ("C:\\Windows\\x.png", MISSING, ""),
        (".", OUTSIDE, ""),
        ("", OUTSIDE, ""),
        ("nul\0.png", MISSING, ""),
        ("x" * 5000, MISSING, ""),
    ],
)
def test_several_files_or_none_are_a_reason_with_the_nearest(named: str, reason: str, detail: str) -> None:
    with pytest.raises(Unusable) as refused:
        FileNames(["a.png", "A.png", "cat-0001.png"], ROOT).find(named)
    assert (str(refused.value), refused.value.detail) == (reason, detail)


def test_the_exact_name_goes_before_what_is_like_it() -> None:
    assert FileNames(["a.png", "A.png"]).find("a.png") == "a.png"
    assert FileNames(["a.png", "A.png"]).find("A.png") == "A.png"


def test_no_picture_is_counted_twice(tmp_path: Path) -> None:
    for number in range(3):
        add(tmp_path, f"images/IMG_{number}.JPG", None, picture(number), format="JPEG")
    named = ["images\\IMG_0.JPG", "images/img_0.jpg", "images/img_1.jpg", "images/gone.jpg"]
    rows = [json.dumps({"file_name": name, "text": f"row {number}"}) + "\n" for number, name in enumerate(named)]
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    add(tmp_path, "images/IMG_2.JPG", "beside", picture(2), format="JPEG")
    found, rejections = Folder(data_in(tmp_path)).candidates()
    assert [(c.key, c.caption.text) for c in found] == [
        ("images/IMG_0.JPG", "row 0"), ("images/IMG_1.JPG", "row 2"), ("images/IMG_2.JPG", "beside"),
    ]  # fmt: skip
    assert [(r.name, r.reason, r.detail) for r in rejections] == [
        ("images/img_0.jpg", NAMED_TWICE, "row 2 of metadata.jsonl"), ("images/gone.jpg", MISSING, ""),
    ]  # fmt: skip


def test_a_hidden_picture_is_read_where_metadata_name_it(tmp_path: Path) -> None:
    add(tmp_path, ".cache/a.png", None, picture(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": ".cache/a.png", "text": "named"}\n')
    found, rejections = Folder(data_in(tmp_path)).candidates()
    assert [(c.key, c.caption.text) for c in found] == [(".cache/a.png", "named")]
    assert rejections == []
