from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcmlora.config import Data
from lcmlora.data.reading import candidates, tables, tar_samples
from lcmlora.data.reading.candidates import NO_NAME
from lcmlora.data.sources import source as sources
from lcmlora.data.sources.source import Record, fit, open_picture, survey
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture
from tests.data.test_bulk_sources import table, tar


def found(folder: Path) -> dict[str, str]:
    """Captions by key."""
    return {r.key: r.caption for r in survey(data_in(folder)).records}


def rejected(folder: Path) -> dict[str, str]:
    """Reasons by name."""
    return {r.name: r.reason for r in survey(data_in(folder)).rejections}


def opened(folder: Path, key: str) -> np.ndarray:
    data = data_in(folder)
    record = next(r for r in survey(data).records if r.key == key)
    image = open_picture(data, record)
    assert image.mode == "RGB"
    assert image.size == (record.width, record.height)
    return np.asarray(image)


# --- layouts


def test_pictures_beside_captions_are_found_in_nested_folders(folder: Path) -> None:
    add(folder, "nested/deeper/a.JPG", "a deep one", picture(20), format="JPEG")
    add(folder, "nested/.hidden/b.png", None, picture(21))
    captions = found(folder)
    assert captions["nested/deeper/a.JPG"] == "a deep one"
    assert captions["3.png"] == "subject 3"
    assert len(captions) == 9


def test_a_record_carries_the_digest_and_the_size_of_the_file(folder: Path) -> None:
    path = add(folder, "wide.png", "wide", picture(30, (48, 32)))
    record = next(r for r in survey(data_in(folder)).records if r.key == "wide.png")
    assert (record.width, record.height) == (48, 32)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_the_hugging_face_convention_names_the_captions(tmp_path: Path, name: str) -> None:
    rows = [("a.png", "one, two"), ("sub/b.png", 'say "hi"')]
    for number, (file, _) in enumerate(rows):
        add(tmp_path, file, None, picture(number))
    if name.endswith("csv"):
        text = 'file_name,extra,text\r\na.png,1,"one, two"\r\nsub/b.png,2,"say ""hi"""\r\n'
    else:
        text = "".join(json.dumps({"file_name": f, "text": t, "extra": 1}) + "\n" for f, t in rows)
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")  # with the mark that spreadsheets write
    assert found(tmp_path) == dict(rows)


def test_metadata_in_a_nested_folder_counts_for_that_folder(tmp_path: Path) -> None:
    add(tmp_path, "train/a.png", None, picture(0))
    add(tmp_path, "b.png", "beside", picture(1))
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "listed"}\n')
    assert found(tmp_path) == {"b.png": "beside", "train/a.png": "listed"}


def test_metadata_rows_without_a_file_or_out_of_the_folder_or_twice_are_reported(tmp_path: Path) -> None:
    add(tmp_path, "in/a.png", None, picture(0))
    add(tmp_path, "secret.png", None, picture(1))
    names = ["a.png", "gone.png", "../secret.png", str(tmp_path / "secret.png"), "a.png", "x" * 5000, "nul\0.png"]
    lines = "".join(json.dumps({"file_name": n, "text": "t"}) + "\n" for n in names)
    (tmp_path / "in" / "metadata.jsonl").write_text(lines)
    assert found(tmp_path / "in") == {"a.png": "t"}
    assert rejected(tmp_path / "in") == {
        "gone.png": candidates.MISSING,
        "../secret.png": candidates.OUTSIDE,
        str(tmp_path / "secret.png"): candidates.OUTSIDE,
        "a.png": candidates.NAMED_TWICE,
        "x" * 5000: candidates.MISSING,
        "nul\0.png": candidates.MISSING,
    }


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    secret = add(tmp_path, "secret.png", "secret words", picture(1))
    (folder / "link.png").symlink_to(secret)
    (folder / "link.txt").write_text("mine")
    add(folder, "words.png", None, picture(40))
    (folder / "words.txt").symlink_to(tmp_path / "secret.txt")
    assert rejected(folder) == {"link.png": candidates.LINKED, "words.png": candidates.LINKED}


def test_a_linked_data_folder_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert len(found(tmp_path / "link")) == 8


@pytest.mark.parametrize(
    ("name", "rows", "number", "reason"),
    [
        ("metadata.jsonl", '{"file_name": "9.png"}', 2, NO_NAME),
        ("metadata.jsonl", '{"file_name": 9, "text": "nine"}', 2, NO_NAME),
        ("metadata.jsonl", "{broken", 2, tables.NOT_JSON),
        ("metadata.jsonl", '["9.png"]', 2, tables.NOT_JSON),
        ("metadata.jsonl", "[" * 200_000, 2, tables.NOT_JSON),
        ("metadata.jsonl", '{"file_name": "9.png", "text": "caf\udce9"}', 2, candidates.NOT_UTF8),
        ("metadata.csv", "9.png", 2, tables.FEWER_FIELDS),
        ("metadata.csv", "9.png,1girl, solo", 2, tables.MORE_FIELDS),
    ],
)
def test_a_row_of_metadata_that_cannot_be_understood_costs_itself(
    folder: Path, name: str, rows: str, number: int, reason: str
) -> None:
    first, last = (
        ("0.png,first", "1.png,last") if name.endswith("csv") else (_row("0.png", "first"), _row("1.png", "last"))
    )
    lines = [first, rows, last]
    if name.endswith("csv"):
        lines.insert(0, "file_name,text")
    (folder / name).write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    found = survey(data_in(folder))
    records, rejections = found.records, found.rejections
    captions = {r.key: r.caption for r in records}
    assert [captions[f"{n}.png"] for n in range(3)] == ["first", "last", "subject 2"]
    assert [(r.name, r.reason) for r in rejections] == [(f"{name}/{number:06d}", reason)]


def test_a_row_without_a_caption_names_the_picture_and_the_row(folder: Path) -> None:
    add(folder, "bare.png", None, picture(30))
    rows = [_row("0.png", "first"), '{"file_name": "bare.png", "text": null}', '{"file_name": "1.png", "text": " "}']
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    found = survey(data_in(folder))
    records, rejections = found.records, found.rejections
    assert {r.key: r.caption for r in records}["1.png"] == "subject 1"  # as the file beside it says
    assert [(r.name, r.reason, r.detail) for r in rejections] == [
        ("bare.png", candidates.NO_CAPTION, "row 2 of metadata.jsonl")
    ]


def _row(name: str, text: str) -> str:
    return json.dumps({"file_name": name, "text": text})


# --- bad input


def test_maps_beside_their_pictures_are_not_trained_on_and_do_not_stop_the_run(folder: Path) -> None:
    good = found(folder)
    maps = [f"{Path(name).with_suffix('')}{word}.png" for name in good for word in ("-masklabel", "_depth", ".mask")]
    for number, name in enumerate(maps):
        add(folder, name, None, picture(100 + number, (64, 48)))
    add(folder, "party-mask.png", "a mask for a party", picture(90, (64, 48)))  # a caption makes it a picture
    assert found(folder) == good | {"party-mask.png": "a mask for a party"}
    assert rejected(folder) == dict.fromkeys(maps, tar_samples.AUXILIARY)


def test_an_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures"):
        survey(data_in(tmp_path))
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        survey(data_in(tmp_path / "nowhere"))


def test_a_truncated_png_or_jpeg_is_dropped_and_reported(folder: Path) -> None:
    for suffix in ("png", "jpg"):
        whole = add(folder, f"cut.{suffix}", "cut", picture(50, (64, 64))).read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: -len(whole) // 8])
    assert rejected(folder) == {"cut.png": candidates.DAMAGED, "cut.jpg": candidates.DAMAGED}
    assert len(found(folder)) == 8


def test_what_is_no_picture_is_dropped_and_reported_with_its_reason(folder: Path) -> None:
    add(folder, "empty.png", "c", b"")
    add(folder, "text.png", "c", b"hello")
    add(folder, "animation.gif", "c", picture(1))
    add(folder, "disguised.png", "c", picture(1), format="TIFF")
    add(folder, "noise.txt.png", None, picture(2))
    (folder / "noise.txt.txt").write_bytes(b"\xff\xfe\x00caption")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    assert rejected(folder) == {
        "animation.gif": candidates.NOT_A_PICTURE,
        "broken.png": candidates.MISSING,
        "disguised.png": candidates.NOT_A_PICTURE,
        "empty.png": candidates.EMPTY,
        "noise.txt.png": candidates.NOT_UTF8,
        "text.png": candidates.NOT_A_PICTURE,
    }


@pytest.mark.parametrize("side", [9_500, 20_000])  # over Pillow's limit once, where it only warns, and twice
def test_a_decompression_bomb_is_dropped_before_it_is_unpacked(folder: Path, side: int) -> None:
    add(folder, "bomb.png", "boom", Image.new("1", (side, side)))
    assert rejected(folder) == {"bomb.png": candidates.TOO_LARGE}


def test_a_wrong_extension_does_not_matter(folder: Path) -> None:
    add(folder, "really-a-jpeg.png", "c", picture(70), format="JPEG")
    assert opened(folder, "really-a-jpeg.png").shape == (32, 32, 3)


# --- decoding


def test_exif_rotation_is_applied(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the left by the camera
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    add(folder, "turned.png", "c", image, exif=exif)
    pixels = opened(folder, "turned.png")
    assert pixels.shape == (40, 20, 3)
    assert pixels[:20].max() == 0 and pixels[20:].min() == 255


def test_alpha_lies_over_white(folder: Path) -> None:
    add(folder, "alpha.png", "c", Image.new("RGBA", (32, 32), (255, 0, 0, 0)))
    add(folder, "half.webp", "c", Image.new("RGBA", (32, 32), (0, 0, 0, 128)), lossless=True)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    add(folder, "palette.png", "c", palette, transparency=1)
    assert opened(folder, "alpha.png").min() == 255
    assert opened(folder, "half.webp")[0, 0].tolist() == [127, 127, 127]
    assert opened(folder, "palette.png").min() == 255


def test_sixteen_bits_are_scaled_and_not_clipped(folder: Path) -> None:
    grey = np.full((32, 32), 0x8000, dtype=np.uint16)
    add(folder, "grey16.png", "c", Image.fromarray(grey))
    assert opened(folder, "grey16.png")[0, 0].tolist() == [128, 128, 128]


def test_cmyk_and_animations_become_one_rgb_picture(folder: Path) -> None:
    add(folder, "print.jpg", "c", Image.new("CMYK", (32, 32), (0, 255, 255, 0)))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("blue", "lime")]
    add(folder, "moving.webp", "c", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    red = opened(folder, "print.jpg")[16, 16]
    assert red[0] > 250 and red[1:].max() < 5
    assert opened(folder, "moving.webp")[0, 0].tolist() == [0, 0, 255]


def test_a_picture_that_changed_after_the_list_was_made_is_an_error(folder: Path) -> None:
    data = data_in(folder)
    record = survey(data).records[0]
    add(folder, record.key, None, picture(99))
    with pytest.raises(UserError, match=r"0\.png: it has changed.*lcmlora prepare"):
        open_picture(data, record)
    (folder / record.key).unlink()
    with pytest.raises(UserError, match=r"0\.png: file cannot be read.*lcmlora prepare"):
        open_picture(data, record)


@pytest.mark.parametrize(
    ("size", "corner"),
    [((64, 32), (0, 8)), ((32, 64), (8, 0)), ((16, 16), (0, 0)), ((33, 47), (3, 0)), ((7, 5), (0, 3))],
)
def test_fit_resizes_the_short_side_and_crops_the_centre(size: tuple[int, int], corner: tuple[int, int]) -> None:
    fitted, crop = fit(picture(0, size), 16)
    assert fitted.size == (16, 16)
    assert crop == corner


# --- captions


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tred\r\n apple \x00\x07", "a red apple"),
        ("ﬁne café", "fine café"),
        ("wide\u3000space\u00a0", "wide space"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("\u0000", ""),
    ],
)
def test_captions_are_cleaned(raw: str, clean: str) -> None:
    assert candidates.clean_caption(raw) == (clean, None)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<p>a <b>red</b> apple &amp; pear</p>", "a red apple & pear"),
        ("red apple https://shop.example/a?b=c", "red apple"),
        ("see www.example.org for red apples", "see for red apples"),
        ("apple <!-- 3 for 2 --> red", "apple red"),
        ("&lt;br/&gt; apple", "apple"),
        ("3 < 4 and 5 > 4", "3 < 4 and 5 > 4"),
        ("<3 apples", "<3 apples"),
        ("<b></b>", ""),
    ],
)
def test_markup_and_addresses_are_taken_out_of_captions_and_the_raw_one_is_kept(raw: str, clean: str) -> None:
    assert candidates.clean_caption(raw) == (clean, raw if raw != clean else None)


@pytest.mark.parametrize("part", ["<!--", "<a ", "https://", "&lt;", "<"])
def test_no_caption_takes_long_to_clean(part: str) -> None:
    candidates.clean_caption(part * (candidates.MAX_CAPTION // len(part)))  # backtracking would take hours


def test_the_list_has_the_raw_caption_beside_the_clean_one(folder: Path) -> None:
    add(folder, "0.png", "<i>subject</i> 0", picture(0))
    records = {r.key: r for r in survey(data_in(folder)).records}
    assert (records["0.png"].caption, records["0.png"].raw_caption) == ("subject 0", "<i>subject</i> 0")
    assert records["1.png"].raw_caption is None


# --- filters


def _rows(root: Path) -> list[dict[str, object]]:
    rows = []
    for number, score in enumerate([6.5, 4.0, None, "7", "high", float("nan")]):
        add(root, f"{number}.png", None, picture(number))
        rows.append(
            {"file_name": f"{number}.png", "text": f"subject {number}", "aesthetic": score, "risk": 0.1 * number}
        )
    return rows


@pytest.mark.parametrize("source", ["metadata.jsonl", "tars", "parquet"])
def test_pictures_whose_scores_are_out_of_range_or_missing_are_dropped_before_they_are_decoded(
    tmp_path: Path, source: str
) -> None:
    rows, kind = _rows(tmp_path / "in"), "folder"
    path = tmp_path / "in"
    if source == "tars":
        kind, path = "webdataset", tmp_path / "a.tar"
        members = [
            member
            for row in rows
            for member in (
                (str(row["file_name"]), (tmp_path / "in" / str(row["file_name"])).read_bytes()),
                (str(row["file_name"]).replace("png", "json"), json.dumps(row).encode()),
            )
        ]
        tar(path, *members)
    elif source == "parquet":
        kind, path = "parquet", tmp_path / "a.parquet"
        scores = [6.5, 4.0, None, 7.0, None, float("nan")]
        pictures = [(tmp_path / "in" / str(row["file_name"])).read_bytes() for row in rows]
        texts, risks = ([row[name] for row in rows] for name in ("text", "risk"))
        table(path, image=pictures, text=texts, aesthetic=scores, risk=risks)
    else:
        (tmp_path / "in" / source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_in(path, source=kind, scores={"aesthetic": {"min": 5}, "risk": {"max": 0.25}})
    found = survey(data)
    records, rejections = found.records, found.rejections
    assert [r.caption for r in records] == ["subject 0"]
    assert [r.reason for r in rejections] == [
        "aesthetic under 5 (data.scores)", "no aesthetic (data.scores)", "risk over 0.25 (data.scores)",
        "no aesthetic (data.scores)", "no aesthetic (data.scores)",
    ]  # fmt: skip


def test_a_table_without_the_column_of_a_score_is_an_error(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", image=[b"x"], text=["t"])
    data = data_in(tmp_path / "a.parquet", source="parquet", scores={"aesthetic": {"min": 5}})
    with pytest.raises(UserError, match=r"a\.parquet: no column aesthetic \(data\.scores\)"):
        survey(data)


def test_one_file_of_metadata_names_the_pictures_that_count(folder: Path) -> None:
    (folder / "some.csv").write_text("file_name,text\n3.png,three\n5.png,five\n")
    data = data_in(folder / "some.csv")
    records = survey(data).records
    assert [(r.key, r.caption) for r in records] == [("3.png", "three"), ("5.png", "five")]
    assert open_picture(data, records[1]).size == (32, 32)


# --- lists


def test_records_come_back_from_their_list_as_they_went_in(tmp_path: Path) -> None:
    records = [Record("a/ü.png", "line\u2028separator\x85 日本", "0" * 64, 3, 4)]
    sources.write_records(tmp_path / "list.jsonl", records)
    assert sources.read_records(tmp_path / "list.jsonl") == records


def test_a_missing_or_foreign_list_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lcmlora prepare"):
        sources.read_records(tmp_path / "list.jsonl")
    (tmp_path / "list.jsonl").write_text('{"url": "x"}\n')
    with pytest.raises(UserError, match="not a list of pictures"):
        sources.read_records(tmp_path / "list.jsonl")


# --- emoji


def test_emoji_have_a_record_for_every_style_subject_and_copy(emoji_data: Data) -> None:
    found = survey(emoji_data)
    records, rejections = found.records, found.rejections
    apples = [r for r in records if r.caption == "red apple"]
    assert [r.key for r in apples] == [f"{s}/1f34e/{c}" for s in ("noto", "fluent-emoji-flat") for c in (0, 1)]
    assert len({r.sha256 for r in records}) == len(records) > 400
    assert rejections == []


def test_emoji_are_drawn_at_the_size_asked_for_and_always_the_same(emoji_data: Data) -> None:
    record = survey(emoji_data).records[0]
    first, second = (open_picture(emoji_data, record, size=64) for _ in range(2))
    assert first.size == (64, 64)
    assert first.tobytes() == second.tobytes()
    assert open_picture(emoji_data, record).size == (128, 128)


def test_emoji_without_styles_are_an_error(emoji_data: Data) -> None:
    with pytest.raises(UserError, match=r"data\.styles and data\.groups"):
        survey(emoji_data.model_copy(update={"styles": ()}))
