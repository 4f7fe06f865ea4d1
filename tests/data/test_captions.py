"""Which file has the caption of which picture, what it keeps of it, and what becomes of every other file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcmlora.data.prepare import prepare_pictures, print_report
from lcmlora.data.reading.candidates import AMBIGUOUS, NO_CAPTION, NOT_UTF8, clean_caption
from lcmlora.data.reading.captions import BAD_JSON
from lcmlora.data.sources.folder import Folder
from lcmlora.data.sources.source import survey
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture
from tests.data.test_bulk_sources import png, sample, table, tar


def captions(folder: Path, *scores: str) -> dict[str, str]:
    return {
        c.key: c.caption.text for c in Folder(data_in(folder, scores={name: {} for name in scores})).candidates()[0]
    }


def reasons(folder: Path) -> dict[str, tuple[str, str]]:
    return {r.name: (r.reason, r.detail) for r in Folder(data_in(folder)).candidates()[1]}


def unused_files(folder: Path) -> dict[str, int]:
    read = Folder(data_in(folder))
    read.candidates()
    return {kind: found["count"] for kind, found in read.unused_files().by_kind().items()}


@pytest.mark.parametrize(
    ("picture_name", "caption_name"),
    [
        ("a.png", "a.txt"), ("a.png", "a.TXT"), ("A.JPG", "A.TXT"), ("a.png", "a.caption"), ("a.png", "a.Caption"),
        ("a.png", "a.text"), ("a.png", "a.png.txt"), ("a.b.png", "a.b.txt"), ("IMG_1.JPG", "img_1.txt"),
        ("a.jfif", "a.txt"), ("a.jpe", "a.caption"), ("caf\u00e9.png", "cafe\u0301.txt"), ("a.png", "a.json"),
    ],
)  # fmt: skip
def test_a_caption_is_read_whatever_its_ending_and_its_case(
    tmp_path: Path, picture_name: str, caption_name: str
) -> None:
    add(tmp_path, picture_name, None, picture(0), format="JPEG")
    text = json.dumps({"caption": "words"}) if caption_name.endswith("json") else "words"
    (tmp_path / caption_name).write_text(text)
    assert list(captions(tmp_path).values()) == ["words"]
    assert unused_files(tmp_path) == {}


def test_of_several_captions_the_first_that_says_something_counts_and_the_others_are_told(tmp_path: Path) -> None:
    add(tmp_path, "a.png", None, picture(0))
    for ending in ("txt", "caption", "text"):
        (tmp_path / f"a.{ending}").write_text(f"from {ending}")
    (tmp_path / "a.json").write_text('{"caption": "from json", "aesthetic": 7}')
    assert captions(tmp_path) == {"a.png": "from txt"}
    assert unused_files(tmp_path) == {"captions of pictures that have another": 2, ".json": 1}
    (tmp_path / "a.txt").write_text(" \n")
    assert captions(tmp_path) == {"a.png": "from caption"}
    (found,), _ = Folder(data_in(tmp_path, scores={"aesthetic": {}})).candidates()
    assert (found.caption.text, found.scores) == ("from caption", {"aesthetic": 7.0})
    for ending in ("caption", "text"):
        (tmp_path / f"a.{ending}").unlink()
    assert captions(tmp_path) == {"a.png": "from json"}
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,from metadata\n")
    assert captions(tmp_path) == {"a.png": "from metadata"}


def test_several_lines_are_one_caption(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "a red fox in snow\nphoto of an animal\r\n\nvulpes vulpes", picture(0))
    assert captions(tmp_path) == {"a.png": "a red fox in snow photo of an animal vulpes vulpes"}


def test_captions_that_cannot_be_read_or_told_apart_are_a_reason(tmp_path: Path) -> None:
    for name in ("bytes.png", "Both.png", "empty.png", "deep.png", "none.png"):
        add(tmp_path, name, None, picture(len(name)))
    (tmp_path / "bytes.caption").write_bytes(b"caf\xe9")
    (tmp_path / "bytes.text").write_text("good")
    for name in ("both.txt", "BOTH.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "deep.json").write_text("[" * 60_000)
    (tmp_path / "none.json").write_text('{"caption": ["a list"]}')
    assert reasons(tmp_path) == {
        "bytes.png": (NOT_UTF8, ""),
        "Both.png": (AMBIGUOUS, "its caption could be BOTH.txt or both.txt"),
        "empty.png": (NO_CAPTION, ""),
        "deep.png": (BAD_JSON, ""),
        "none.png": (NO_CAPTION, ""),
    }


def test_every_file_that_nothing_is_made_of_is_counted_by_its_ending(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "a", picture(0))
    strangers = ["b.jxl", "c.heif", "C.HEIF", "d.npz", "e.tar.gz", "f.zip", "LICENSE", "g.parquet", "metadata1.jsonl"]
    for name in (*strangers, "orphan.txt", "orphan.caption", "sub/._a.png", ".DS_Store", "h.tar", "x.verylongending99"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert unused_files(tmp_path) == {
        "captions without a picture": 2, "hidden (a name that begins with a dot)": 2, ".heif": 2, ".jxl": 1,
        ".npz": 1, ".tar.gz": 1, ".zip": 1, ".parquet": 1, ".jsonl": 1, ".tar": 1, "without an ending": 1,
        "other endings": 1,
    }  # fmt: skip


def test_tables_tar_files_and_prompts_count_their_unused_files_too(tmp_path: Path) -> None:
    tar(tmp_path / "tars/a.tar", *sample(0), *sample(1))
    table(tmp_path / "tables/a.parquet", image=[png(0), png(1)], text=["one", "two"])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/a.txt").write_text("a fox\nan owl\n")
    kinds = {"webdataset": "tars", "parquet": "tables", "prompts": "prompts"}
    for kind, name in kinds.items():
        for stranger in ("b.tar.gz", "c.tgz", "README.md", "more/d.json"):
            (tmp_path / name / stranger).parent.mkdir(exist_ok=True)
            (tmp_path / name / stranger).write_bytes(b"x")
        found = survey(data_in(tmp_path / name, source=kind))
        assert len(found.records) == 2
        assert {k: v["first"] for k, v in found.unused_files.items()} == {
            ".json": ["more/d.json"], ".md": ["README.md"], ".tar.gz": ["b.tar.gz"], ".tgz": ["c.tgz"],
        }  # fmt: skip
    assert survey(data_in(tmp_path / "tars/a.tar", source="webdataset")).unused_files == {}


def test_the_report_and_the_table_tell_what_was_not_read_and_what_was_cleaned(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (folder / f"{number}.jxl").write_bytes(b"x")
    add(folder, "9.png", "a <b>bold</b> fox", picture(9))
    (folder / "\x1b[31mred.npz").write_bytes(b"x")
    report = prepare_pictures(data_in(folder), 2, tmp_path / "out")
    assert report["passed_over"][".jxl"] == {"count": 3, "first": ["0.jxl", "1.jxl", "2.jxl"]}
    assert report["cleaned"] == {"count": 1, "first": ["9.png"]}
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    print_report(report)
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert "not read: files .jxl 3" in " ".join(printed.replace("│", " ").split())


def test_a_set_without_anything_else_has_no_further_keys(folder: Path, tmp_path: Path) -> None:
    assert sorted(prepare_pictures(data_in(folder), 2, tmp_path / "out")) == [
        "dropped", "kept", "read", "source", "test", "train", "validation",
    ]  # fmt: skip


def test_an_error_tells_what_lies_there_instead(tmp_path: Path) -> None:
    for name in ("a.jxl", "b.jxl", "c.zip"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no pictures.*there are 2 \.jxl, 1 \.zip"):
        survey(data_in(tmp_path))


# --- what is kept of a caption


@pytest.mark.parametrize(
    "text",
    [
        "a photo of <cat-toy> on a beach", "a <s0><s1> woman", "<lora:style:0.8> sks dog", "<sks> person", "<3 apples",
        "<my_token> vase", "a<b", "AT&T, R&notes, black&gold", "5 < 6 > 4", "(red:1.3), [[blurry]], tag_name",
        "a <b and c> d", "<|endoftext|>", "</s0>", "<Midjourney-Style>", "<1girl>", "price < cost > value",
    ],
)  # fmt: skip
def test_trigger_words_and_signs_stay(text: str) -> None:
    assert clean_caption(text) == (text, None)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<b>red</b> <I>fox</I>", "red fox"), ("one<br>two<br/>three<br />", "one two three"),
        ('<a href="x.html">fox</a>', "fox"), ("<font color=red>fox</font >", "fox"), ("&lt;p&gt;fox", "fox"),
        ('<img src="a.png" alt="b">fox <cat-toy>', "fox <cat-toy>"), ("<h1>fox</h1>", "fox"),
        ("cats &amp; dogs", "cats & dogs"),
    ],
)  # fmt: skip
def test_elements_of_html_are_taken_out(text: str, left: str) -> None:
    assert clean_caption(text) == (left, text)
