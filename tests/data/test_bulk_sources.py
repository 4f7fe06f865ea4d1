"""Pictures in parquet and tar files, here and in a bucket."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lcmlora.config import Data
from lcmlora.data.prepare import PARTS, prepare_pictures
from lcmlora.data.reading import candidates, tar_members, tar_samples
from lcmlora.data.sources import tars
from lcmlora.data.sources.guess import source_of
from lcmlora.data.sources.parquet import NO_BYTES
from lcmlora.data.sources.source import open_picture, read_records, survey
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture

Member = tuple[str | tarfile.TarInfo, bytes]


def png(number: int, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    picture(number, size).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, *members: Member) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = 0 if info.islnk() or info.issym() else len(content)
            made.addfile(info, io.BytesIO(content))
    return path


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def sample(number: int) -> list[Member]:
    return [(f"{number:04d}.png", png(number)), (f"{number:04d}.txt", f"subject {number}".encode())]


def reasons(data: Data) -> dict[str, str]:
    return {rejection.name: rejection.reason for rejection in survey(data).rejections}


def layouts(root: Path, count: int = 8) -> dict[str, Data]:
    """So many pictures, an even number, in every layout."""
    numbers = range(count)
    for number in numbers:
        content, name = png(number), f"{number:04d}.png"
        for folder in ("folder", "jsonl", "csv"):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / name).write_bytes(content)
        (root / "folder" / f"{number:04d}.txt").write_text(f"subject {number}")
    rows = [{"file_name": f"{number:04d}.png", "text": f"subject {number}"} for number in numbers]
    (root / "jsonl" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{row['file_name']},{row['text']}\n" for row in rows]
    (root / "csv" / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    for half in (numbers[: count // 2], numbers[count // 2 :]):
        name = f"{half[0]:04d}"
        tar(root / "tars" / f"{name}.tar", *(m for number in half for m in sample(number)))
        table(
            root / "tables" / f"{name}.parquet",
            image=[png(number) for number in half],
            TEXT=[f"subject {number}" for number in half],
        )
    table(
        root / "hub.parquet",
        image=[{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
        text=[f"subject {number}" for number in numbers],
    )
    kinds = {"folder": "folder", "jsonl": "folder", "csv": "folder", "tars": "webdataset", "tables": "parquet"}
    return {name: data_in(root / name, source=kind) for name, kind in (kinds | {"hub.parquet": "parquet"}).items()}


def test_the_same_pictures_are_the_same_in_every_layout(tmp_path: Path):
    found = {}
    for name, data in layouts(tmp_path).items():
        assert source_of(data.path) == data.source
        in_layout = survey(data)
        assert in_layout.rejections == []
        found[name] = [(r.caption, r.sha256, r.width, r.height) for r in in_layout.records]
        last = in_layout.records[-1]
        assert np.array_equal(np.asarray(open_picture(data, last)), np.asarray(picture(7))), name
    assert all(each == found["folder"] for each in found.values())
    assert [caption for caption, *_ in found["folder"]] == [f"subject {number}" for number in range(8)]


def test_a_caption_is_also_found_in_a_samples_json(tmp_path: Path):
    told = json.dumps({"url": "x", "caption": " in  JSON "}).encode()
    tar(tmp_path / "a.tar", ("dir.v1/1.json", told), ("dir.v1/1.jpg", png(1)), ("dir.v1/1.cls", b"7"))
    (record,) = survey(data_in(tmp_path / "a.tar", source="webdataset")).records
    assert (record.key, record.caption) == ("a.tar/dir.v1/1.jpg", "in JSON")


def test_hostile_tar_files_give_a_reason_each_and_run_nothing(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    link, hard, device, folder = (tarfile.TarInfo(name) for name in ("link.png", "hard.png", "null.png", "dir.png"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "0000.png"
    device.type, folder.type = tarfile.CHRTYPE, tarfile.DIRTYPE
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    named = [(link, "link"), (hard, "hard"), (device, "null")]
    tar(
        tmp_path / "in" / "a.tar",
        *sample(0),
        ("code.pkl", pickle.dumps(Evil())),
        ("0001.png", png(1)),
        ("0001.pkl", pickle.dumps(Evil())),
        ("../up.png", png(2)),
        ("../up.txt", b"up"),
        ("/etc/absolute.png", png(3)),
        ("/etc/absolute.txt", b"absolute"),
        *(member for info, name in named for member in ((info, b""), (f"{name}.txt", b"c"))),
        (folder, b""),
        ("empty.png", b""),
        ("empty.txt", b"c"),
        ("bomb.png", bomb.getvalue()),
        ("bomb.txt", b"boom"),
        ("latin.png", png(4)),
        ("latin.txt", b"caf\xe9"),
        ("long.png", png(5)),
        ("long.txt", b"a" * (1 << 20)),
        ("deep.png", png(6)),
        ("deep.json", b"[" * 60_000),
        ("control.png", png(7)),
        ("control.txt", b"\x00\x07\x1b"),
        ("text.png", b"no picture"),
        ("text.txt", b"c"),
        ("n\udcff.png", png(8)),
        ("n\udcff.txt", b"c"),
        *sample(9),
    )
    data = data_in(tmp_path / "in", source="webdataset")
    assert [record.key for record in survey(data).records] == ["a.tar/0000.png", "a.tar/0009.png"]
    assert reasons(data) == {
        "a.tar/code": tars.NO_PICTURE,
        "a.tar/0001.png": candidates.NO_CAPTION,
        "a.tar/../up.png": candidates.OUTSIDE,
        "a.tar//etc/absolute.png": candidates.OUTSIDE,
        "a.tar/link.png": tars.NO_FILE,
        "a.tar/hard.png": tars.NO_FILE,
        "a.tar/null.png": tars.NO_FILE,
        "a.tar/empty.png": candidates.EMPTY,
        "a.tar/bomb.png": candidates.TOO_LARGE,
        "a.tar/latin.png": candidates.NOT_UTF8,
        "a.tar/long.png": candidates.LONG_CAPTION,
        "a.tar/deep.png": "its JSON cannot be read",
        "a.tar/control.png": candidates.NO_CAPTION,
        "a.tar/text.png": candidates.NOT_A_PICTURE,
        "a.tar/n\\udcff.png": candidates.NOT_UTF8,
    }
    assert not (tmp_path / "ran").exists()


def test_a_tar_file_that_was_cut_off_or_is_none_is_told_and_the_others_are_read(tmp_path: Path):
    whole = tar(tmp_path / "in" / "a.tar", *(m for number in range(4) for m in sample(number))).read_bytes()
    (tmp_path / "in" / "b.tar").write_bytes(whole[: 5 * 1024 + 100])
    (tmp_path / "in" / "c.tar").write_bytes(b"not a tar file at all" * 100)
    (tmp_path / "in" / "d.tar").write_bytes(b"")
    data = data_in(tmp_path / "in", source="webdataset")
    found = survey(data)
    records, rejections = found.records, found.rejections
    assert [record.key for record in records][:4] == [f"a.tar/{number:04d}.png" for number in range(4)]
    told = {rejection.name: rejection.reason for rejection in rejections}
    assert [told[name] for name in ("b.tar", "c.tar", "d.tar")] == [tar_members.CUT_OFF] * 3


def test_rows_that_cannot_be_used_give_a_reason_each(tmp_path: Path):
    binary = pyarrow.array([b"one", None, b"caf\xe9", b"\x07 ", b"b" * 70_000, b"six", b"seven", b"eight"])
    texts = pyarrow.StringArray.from_buffers(8, *binary.buffers()[1:], binary.buffers()[0])  # unchecked, as some are
    pictures = [png(0), png(1), png(2), png(3), png(4), None, b"", png(7)[:60]]
    table(tmp_path / "a.parquet", caption=texts, jpg=pictures)
    data = data_in(tmp_path / "a.parquet", source="parquet")
    assert [(r.key, r.caption) for r in survey(data).records] == [("a.parquet/000000", "one")]
    assert reasons(data) == {
        "a.parquet/000001": candidates.NO_CAPTION,
        "a.parquet/000002": candidates.NOT_UTF8,
        "a.parquet/000003": candidates.NO_CAPTION,
        "a.parquet/000004": candidates.LONG_CAPTION,
        "a.parquet/000005": NO_BYTES,
        "a.parquet/000006": candidates.EMPTY,
        "a.parquet/000007": candidates.DAMAGED,
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"URL": ["x"], "TEXT": ["t"]}, r"has addresses \(URL\) and no pictures.*img2dataset"),
        (
            {"image": [b""], "label": ["t"]},
            "no column of a caption: expected one of caption, text, TEXT, prompt, got im",
        ),
        ({"image": ["x.png"], "text": ["t"]}, "column image has string, expected bytes of pictures"),
        ({"image": [b""], "text": [[1]]}, "column text has list.*expected texts"),
    ],
)
def test_tables_that_cannot_be_meant_are_an_error_naming_the_column(tmp_path: Path, columns: dict, message: str):
    table(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=message):
        survey(data_in(tmp_path, source="parquet"))


def test_nothing_to_read_is_an_error(tmp_path: Path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    for source, message in (("parquet", "not a parquet file"), ("webdataset", r"no \.tar files")):
        with pytest.raises(UserError, match=message):
            survey(data_in(tmp_path, source=source))
        with pytest.raises(UserError, match="no such file or folder"):
            survey(data_in(tmp_path / "nowhere", source=source))


def test_a_picture_that_changed_after_the_list_was_made_is_an_error(tmp_path: Path):
    data = data_in(tar(tmp_path / "a.tar", *sample(0)), source="webdataset")
    (record,) = survey(data).records
    tar(tmp_path / "a.tar", *sample(1))
    with pytest.raises(UserError, match=r"0000\.png: it has changed.*lcmlora prepare"):
        open_picture(data, record)


def test_a_sample_with_several_maps_beside_its_picture_is_no_faulty_one(tmp_path: Path):
    members: list[Member] = []
    for number in range(8):
        content = png(number)
        members += [(f"{number}.{each}", content) for each in ("png", "depth.png", "mask.png", "pose.png")]
        members.append((f"{number}.txt", f"subject {number}".encode()))
    tar(tmp_path / "in/a.tar", *members)
    report = prepare_pictures(data_in(tmp_path / "in", source="webdataset"), 1, tmp_path / "out")
    assert (report["read"], report["kept"]) == (32, 8)
    assert {reason: dropped["count"] for reason, dropped in report["dropped"].items()} == {tar_samples.AUXILIARY: 24}


def test_what_img2dataset_writes_is_read_whatever_lies_beside(tmp_path: Path):
    def facts(number: int) -> dict[str, Any]:
        return {
            "key": f"{number:09d}",
            "caption": f"alt text {number}",
            "status": "success",
            "similarity": float("nan"),
        }

    members: list[Member] = []
    for number in range(8):
        key = f"{number:09d}"
        members += [(f"{key}.jpg", png(number)), (f"{key}.json", json.dumps(facts(number)).encode())]
        members.append((f"{key}.txt", f"subject {number}".encode()))
    tar(tmp_path / "tars/00000.tar", *members)
    with tarfile.open(tmp_path / "tars/00001.tar.gz", "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("9.jpg"))
    rows = [facts(number) for number in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tars/00000.parquet")
    (tmp_path / "tars/00000_stats.json").write_text("{}")
    data = data_in(tmp_path / "tars", source="webdataset")
    report = prepare_pictures(data, 1, tmp_path / "out")
    kept = [r for part in PARTS for r in read_records(tmp_path / f"out/{part}.jsonl")]
    assert report["kept"] == 8 and {r.caption for r in kept} == {f"subject {number}" for number in range(8)}
    assert "00001.tar.gz" in json.dumps(report["passed_over"])

    rows = [facts(number) | {"jpg": png(number)} for number in range(8)]
    rows.append(facts(9) | {"jpg": None, "status": "failed_to_download"})
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tables/00000.parquet")
    report = prepare_pictures(data_in(tmp_path / "tables", source="parquet"), 1, tmp_path / "again")
    assert report["kept"] == 8 and report["dropped"] == {NO_BYTES: {"count": 1, "first": ["00000.parquet/000008"]}}


def test_one_damaged_row_of_forty_costs_itself_in_every_layout(tmp_path: Path):
    for number in range(40):
        add(tmp_path / "jsonl", f"{number}.png", None, picture(number))
        add(tmp_path / "csv", f"{number}.png", None, picture(number))
    texts = [None if number == 20 else f"subject {number}" for number in range(40)]
    lines = [json.dumps({"file_name": f"{number}.png", "text": text}) + "\n" for number, text in enumerate(texts)]
    (tmp_path / "jsonl/metadata.jsonl").write_text("".join(lines))
    lines = [f"{number}.png" + (f",{text}" if text else "") + "\n" for number, text in enumerate(texts)]
    (tmp_path / "csv/metadata.csv").write_text("file_name,text\n" + "".join(lines))
    table(tmp_path / "parquet/a.parquet", image=[png(number) for number in range(40)], text=texts)
    members = [
        (f"{number}.{ending}", content)
        for number, text in enumerate(texts)
        for ending, content in (("png", png(number)), ("json", json.dumps({"text": text}).encode()))
    ]
    tar(tmp_path / "tars/a.tar", *members)
    (tmp_path / "prompts").mkdir()
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (tmp_path / "prompts/a.jsonl").write_text("".join(lines))
    for name, source in (
        ("jsonl", "folder"), ("csv", "folder"), ("parquet", "parquet"), ("tars", "webdataset"), ("prompts", "prompts"),
    ):  # fmt: skip
        report = prepare_pictures(data_in(tmp_path / name, source=source), 1, tmp_path / f"out-{name}")
        assert report["kept"] == 39, (name, report)


def test_where_all_rows_of_metadata_have_unquoted_commas_the_line_says_so_with_a_row(tmp_path: Path):
    for number in range(8):
        add(tmp_path / "in", f"{number}.png", None, picture(number))
    lines = [f"{number}.png,1girl {number}, solo, outdoors\n" for number in range(8)]
    (tmp_path / "in/metadata.csv").write_text("file_name,text\n" + "".join(lines))
    with pytest.raises(UserError, match=r"double quotes.*row 1"):
        prepare_pictures(data_in(tmp_path / "in"), 1, tmp_path / "out")
