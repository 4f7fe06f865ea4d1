"""Parts of a data set that their names call train, validation or test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcmlora.config import Data
from lcmlora.data.prepare import prepare_pictures, print_report
from lcmlora.data.sources import split_names
from lcmlora.data.sources.source import survey
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture
from tests.data.test_bulk_sources import png, sample, table, tar


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test/a.png", "test"), ("images/test/a.png", "test"), ("Test/a.png", "test"), ("TEST/deep/a.png", "test"),
        ("val2017/a.png", "validation"), ("train2017/a.png", "train"), ("test_images/a.png", "test"),
        ("images-val/a.png", "validation"), ("eval/a.png", "test"), ("dev/a.png", "validation"),
        ("validation/a.png", "validation"), ("valid/a.png", "validation"), ("evaluation/a.png", "test"),
        ("train/test/a.png", "train"), ("train/a.png", "train"), ("testing/a.png", "test"), ("training/a.png", "train"),
        ("contest/a.png", None), ("test pattern/a.png", None), ("10_val kilmer/a.png", None), ("latest/a.png", None),
        ("test.png", None), ("test-001.png", None), ("a.png", None), ("developers/a.png", None), ("value/a.png", None),
    ],
)  # fmt: skip
def test_folders_tell_the_split_of_pictures(name: str, split: str | None) -> None:
    assert split_names.split_of(name) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-00000-of-00002.parquet", "test"), ("validation-00000-of-00001.parquet", "validation"),
        ("data/test-00000-of-00001-abcdef.parquet", "test"), ("default/test/0000.parquet", "test"),
        ("cc3m-validation-0000.tar", "validation"), ("test_000.tar", "test"), ("imagenet-val-1.tar", "validation"),
        ("my_eval.jsonl", "test"), ("test.parquet", "test"), ("dev.txt", "validation"), ("val00.tar", "validation"),
        ("train-00000-of-00002.parquet", "train"), ("train-test.tar", "train"), ("00000.tar", None),
        ("latest.tar", None), ("contest-1.tar", None), ("train/test-0.tar", "train"),
    ],
)  # fmt: skip
def test_tables_tar_files_and_lists_tell_it_by_their_own_names_too(name: str, split: str | None) -> None:
    assert split_names.split_of(name, container=True) == split


def parts(root: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        for number in range(place * 4, place * 4 + 4):
            add(root, f"{name}/{number}.png", f"subject {number}", picture(number))
    return root


def keys(data: Data) -> list[str]:
    return [record.key.partition("/")[0] for record in survey(data).records]


def test_what_is_called_test_is_not_trained_on_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_in(parts(tmp_path / "in", "train", "test", "val"))
    rows = [json.dumps({"file_name": f"{number}.png", "text": f"row {number}"}) + "\n" for number in (4, 99)]
    (tmp_path / "in/test/metadata.jsonl").write_text("".join(rows))
    report = prepare_pictures(data, 2, tmp_path / "out")
    assert (report["read"], report["kept"]) == (4, 4)
    first = [f"test/{number}.png" for number in range(4, 8)]
    assert report["left_out"]["test"] == {"of": "pictures", "count": 4, "first": first}
    assert report["left_out"]["validation"]["count"] == 4
    assert "passed_over" not in report  # captions and metadata of these pictures are not unused files
    print_report(report)
    assert "left out: test (data.split) 4 test/4.png" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("split", "found"),
    [("train", {"train"}), ("test", {"test"}), ("all", {"train", "test"}), (["train", "test"], {"train", "test"})],
)
def test_data_split_says_which_are_taken(tmp_path: Path, split: str | list[str], found: set[str]) -> None:
    data = data_in(parts(tmp_path / "in", "train", "test"), split=split)
    assert set(keys(data)) == found
    for name in ("train", "test"):
        tar(tmp_path / f"tars/{name}-000.tar", *(m for number in range(3) for m in sample(number)))
    assert {
        key.partition("-")[0] for key in keys(data_in(tmp_path / "tars", source="webdataset", split=split))
    } == found


def test_a_set_that_is_a_split_as_a_whole_is_taken(tmp_path: Path) -> None:
    assert keys(data_in(parts(tmp_path / "test", "test"))) == ["test"] * 4
    assert len(keys(data_in(tmp_path / "test" / "test"))) == 4
    rows = [json.dumps({"file_name": f"test/{number}.png", "text": f"row {number}"}) + "\n" for number in range(4)]
    (tmp_path / "test" / "metadata.jsonl").write_text("".join(rows))
    assert keys(data_in(tmp_path / "test")) == ["test"] * 4


def test_splits_of_which_none_is_wanted_are_an_error_that_names_them(tmp_path: Path) -> None:
    parts(tmp_path, "test", "val")
    with pytest.raises(UserError, match=r"4 files of test and 4 files of validation .*data\.split"):
        survey(data_in(tmp_path))


def test_tables_and_lists_of_prompts_are_left_out_by_file(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        table(tmp_path / f"tables/data/{name}.parquet", image=[png(1), png(2)], text=["one", "two"])
    found = survey(data_in(tmp_path / "tables", source="parquet"))
    assert {record.key.partition("/")[0] for record in found.records} == {"data"} and len(found.records) == 2
    assert found.left_out == {"test": ["data/test-00000-of-00001.parquet"]}
    (tmp_path / "prompts").mkdir()
    for name in ("prompts.txt", "val.txt"):
        (tmp_path / "prompts" / name).write_text("a fox\nan owl\n")
    assert survey(data_in(tmp_path / "prompts", source="prompts")).left_out == {"validation": ["val.txt"]}


def test_splits_within_one_tar_file_are_told_apart(tmp_path: Path) -> None:
    members = [(f"{part}/{name}", content) for part in ("train", "test") for name, content in sample(len(part))]
    members += [(f"{part}/bare.png", png(len(part) + 20)) for part in ("train", "test")]
    found = survey(data_in(tar(tmp_path / "set.tar", *members), source="webdataset"))
    assert [rejection.name for rejection in found.rejections] == ["set.tar/train/bare.png"]
    assert [record.key for record in found.records] == ["set.tar/train/0005.png"]
    assert found.left_out == {"test": ["test/0004.png"]}
