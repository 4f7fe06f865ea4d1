from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from lcmlora.config import Data
from lcmlora.data.decoding import BAD_PROFILE
from lcmlora.data.prepare import DUPLICATE, PARTS, hold_out, prepare_pictures, print_report
from lcmlora.data.reading.candidates import DAMAGED
from lcmlora.data.sources.source import read_records
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture


def captions(path: Path) -> set[str]:
    return {r.caption for r in read_records(path)}


def test_the_report_counts_what_was_read_kept_and_dropped(folder: Path, tmp_path: Path) -> None:
    whole = add(folder, "cut.png", "cut", picture(50, (64, 64))).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    add(folder, "copy-of-3.png", "the same again", picture(3))
    add(folder, "small.png", "small", picture(51, (32, 15)))
    add(folder, "long.png", "long", picture(52, (33, 16)))
    add(folder, "just-fits.png", "fits", picture(53, (32, 16)))
    report = prepare_pictures(data_in(folder), 4, tmp_path / "out")
    small, long = (
        "shorter side under 16 pixels (data.min_side)",
        "longer side over 2 times the shorter (data.max_aspect)",
    )
    assert report["read"] == 13
    assert report["kept"] == 9
    assert report["dropped"] == {
        DAMAGED: {"count": 1, "first": ["cut.png"]},
        DUPLICATE: {"count": 1, "first": ["copy-of-3.png"]},
        small: {"count": 1, "first": ["small.png"]},
        long: {"count": 1, "first": ["long.png"]},
    }
    assert sum(report[part]["pictures"] for part in PARTS) == 9
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    names = ["rejected.html", "rejected.parquet", "report.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    table = pyarrow.parquet.read_table(tmp_path / "out" / "rejected.parquet").to_pydict()
    assert dict(zip(table["name"], table["reason"], strict=True)) == {
        "cut.png": DAMAGED, "copy-of-3.png": DUPLICATE, "small.png": small, "long.png": long,
    }  # fmt: skip
    page = (tmp_path / "out" / "rejected.html").read_text()
    assert page.count("<img") == 3  # the truncated one has none
    assert all(f"{name}</li>" in page for name in table["name"])


def test_only_the_first_ten_offenders_are_named(folder: Path, tmp_path: Path) -> None:
    for number in range(12):
        add(folder, f"z{number:02d}.png", "x", b"not a picture")
    dropped = prepare_pictures(data_in(folder), 4, tmp_path / "out")["dropped"]
    assert [(d["count"], len(d["first"]), d["first"][0]) for d in dropped.values()] == [(12, 10, "z00.png")]


def test_no_caption_is_in_two_parts(folder: Path, tmp_path: Path) -> None:
    for number in range(40):
        add(folder, f"more{number:02d}.png", f"subject {number % 10}", picture(100 + number, (32, 32 + number % 20)))
    report = prepare_pictures(data_in(folder), 4, tmp_path / "out")
    parts = {part: captions(tmp_path / "out" / f"{part}.jsonl") for part in PARTS}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 10
    assert {part: report[part]["captions"] for part in PARTS} == {part: len(found) for part, found in parts.items()}


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        prepare_pictures(data_in(folder), 4, tmp_path / out)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("validation", "test"), [(0.001, 0.001), (0.09, 0.16), (0.5, 0.499), (0.001, 0.99)])
@pytest.mark.parametrize("count", [3, 4, 500])
def test_every_part_has_a_caption_at_least(count: int, validation: float, test: float) -> None:
    names = {f"caption {i}" for i in range(count)}
    held = hold_out(names, validation, test, seed=0)
    assert held.validation and held.test and not held.validation & held.test
    assert len(held.validation) + len(held.test) < count
    if count == 500:
        assert abs(len(held.validation) / count - validation) < 0.05 and abs(len(held.test) / count - test) < 0.05


def test_two_captions_are_for_training_and_for_test() -> None:
    held = hold_out({"a fox", "an owl"}, 0.09, 0.16, seed=0)
    assert (len(held.validation), len(held.test)) == (0, 1)
    assert hold_out({"a fox"}, 0.09, 0.16, seed=0) == (set(), set())


def test_without_validation_all_others_are_for_training() -> None:
    names = {f"caption {i}" for i in range(100)}
    whole, divided = hold_out(names, 0, 0.25, seed=0), hold_out(names, 0.09, 0.16, seed=0)
    assert not whole.validation and whole.test == divided.validation | divided.test


def test_the_captions_of_test_do_not_depend_on_the_share_for_validation() -> None:
    names = {f"caption {i}" for i in range(100)}
    one, other = (hold_out(names, validation, 0.16, seed=0) for validation in (0.09, 0.5))
    assert one.test == other.test and one.validation < other.validation


def test_the_split_depends_on_the_seed_and_not_on_the_case() -> None:
    names = {f"caption {i}" for i in range(100)}
    one, other = (hold_out(names, 0.2, 0.3, seed=seed) for seed in (0, 1))
    assert one.validation != other.validation and one.test != other.test
    for chosen in hold_out(names | {name.upper() for name in names}, 0.2, 0.3, seed=0):
        assert {c.upper() for c in chosen if c.islower()} == {c for c in chosen if c.isupper()}


def test_more_data_moves_no_caption_to_another_part() -> None:
    names = {f"caption {i}" for i in range(200)}
    before = hold_out(names, 0.2, 0.3, seed=0)
    after = hold_out(names | {f"new {i}" for i in range(200)}, 0.2, 0.3, seed=0)
    assert (after.validation & names, after.test & names) == before


def test_shares_that_leave_nothing_for_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation 0\.5 and test 0\.5 leave no caption for training"):
        data_in(tmp_path, validation=0.5, test=0.5)


def test_less_than_a_batch_is_an_error_with_the_reasons_and_leaves_the_former_result(
    folder: Path, tmp_path: Path
) -> None:
    prepare_pictures(data_in(folder), 4, tmp_path / "out")
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    add(folder, "small.png", "small", picture(51, (15, 15)))
    with pytest.raises(UserError, match=r"training pictures are left and one batch needs 64; read 9.*1 shorter side"):
        prepare_pictures(data_in(folder), 64, tmp_path / "out")
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_one_caption_for_all_is_an_error(tmp_path: Path) -> None:
    for number in range(5):
        add(tmp_path / "in", f"{number}.png", "sks dog", picture(number))
    with pytest.raises(UserError, match="all 5 pictures that are left have one caption"):
        prepare_pictures(data_in(tmp_path / "in"), 2, tmp_path / "out")


def test_emoji_are_all_kept_whatever_the_smallest_side(emoji_data: Data, tmp_path: Path) -> None:
    report = prepare_pictures(emoji_data.model_copy(update={"min_side": 512}), 32, tmp_path / "out")
    assert report["dropped"] == {}
    assert report["read"] == sum(report[part]["pictures"] for part in PARTS) > 400


def test_the_printed_report_names_counts_and_offenders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(folder, "odd [red] name.png", "small", picture(51, (15, 15)))
    print_report(prepare_pictures(data_in(folder), 4, tmp_path / "out"))
    printed = capsys.readouterr()
    assert printed.out == ""
    text = " ".join(printed.err.replace("│", " ").split())
    assert "read 9" in text
    assert "odd [red]" in text


# --- why a run stops


def test_the_reason_of_most_rejections_and_what_to_do_is_the_error(folder: Path, tmp_path: Path) -> None:
    for number in range(20):
        add(folder, f"small-{number:02d}.png", f"small {number}", picture(60 + number, (15, 15)))
    with pytest.raises(UserError) as error:
        prepare_pictures(data_in(folder), 16, tmp_path / "out")
    assert "dropped: 20 shorter side under 16 pixels (data.min_side) (small-00.png, small-01.png" in str(error.value)
    assert "take larger pictures, or lower data.min_side" in str(error.value)
    assert "add pictures" not in str(error.value)


def test_a_run_stops_above_a_share_of_rejections_and_not_for_what_was_asked_for(folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        add(folder, f"text-{number}.png", "c", b"no picture")
    for number in range(30):
        add(folder, f"small-{number}.png", "c", picture(60 + number, (15, 15)))
    assert prepare_pictures(data_in(folder, max_rejected=0.1), 2, tmp_path / "out")["kept"] == 8
    with pytest.raises(UserError, match=r"4 of 42 pictures cannot be used, .*\(0\.09\): 4 not a JPEG.*convert"):
        prepare_pictures(data_in(folder, max_rejected=0.09), 2, tmp_path / "out")


def test_names_that_miss_their_files_tell_of_what_is_not_unpacked(tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": f"{number}.png", "text": f"row {number}"}) + "\n" for number in range(8)]
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"8 of 8 .* 8 no such file \(0\.png, .*images\.zip is not unpacked"):
        prepare_pictures(data_in(tmp_path), 2, tmp_path / "out")


def test_captions_under_another_name_are_named(folder: Path, tmp_path: Path) -> None:
    for number in range(8):
        (folder / f"{number}.txt").rename(folder / f"{number}.words")
    (folder / "metadata1000.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"8 of 8 pictures have no caption .*metadata1000\.jsonl beside them"):
        prepare_pictures(data_in(folder), 2, tmp_path / "out")


def test_a_broken_profile_is_told(folder: Path, tmp_path: Path) -> None:
    add(folder, "8.png", "a fox", picture(8), icc_profile=b"broken")
    report = prepare_pictures(data_in(folder), 2, tmp_path / "out")
    assert report["noted"] == {BAD_PROFILE: {"count": 1, "first": ["8.png"]}}
