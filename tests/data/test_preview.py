import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.data.preview import draw_sheet
from lcmlora.data.sources.guess import source_of
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture
from tests.data.test_bulk_sources import table, tar

PARAMS = Path(__file__).parents[2] / "params.yaml"


def test_a_sheet_shows_pictures_with_captions_and_the_report_counts_all(tmp_path: Path):
    for number in range(6):
        add(tmp_path / "in", f"{number}.png", f"$subject {number}_{{" + " and more" * 40, picture(number, (40, 30)))
    add(tmp_path / "in", "small.png", "too small", picture(7, (8, 8)))
    add(tmp_path / "in", "broken.png", "broken", b"\x89PNG\r\n\x1a\nno more")
    report = draw_sheet(data_in(tmp_path / "in"), 5, tmp_path / "sheet.png")
    assert (report["read"], report["kept"]) == (8, 6)
    with Image.open(tmp_path / "sheet.png") as opened:
        assert opened.width == pytest.approx(4 * 2.4 * 110, abs=1)
        pixels = np.asarray(opened.convert("RGB"))
    assert (pixels[: len(pixels) // 2] != 255).any() and (pixels[len(pixels) // 2 :] != 255).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "sheet.png"]


def test_what_is_no_data_set_leaves_no_sheet(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        draw_sheet(data_in(tmp_path / "empty"), 12, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_the_verb_takes_a_folder_or_the_data_of_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(4):
        add(tmp_path / "in", f"{number}.png", f"subject {number}", picture(number, (80, 80)))
    raw = yaml.safe_load(PARAMS.read_text())
    raw["data"] |= {"source": "folder", "path": "missing"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["data", "preview", "in", "--count", "2", "--out", "two.png"])
    assert (done.exit_code, done.stdout) == (0, "two.png\n")
    assert (tmp_path / "two.png").is_file()
    failed = CliRunner().invoke(app, ["data", "preview"])
    assert isinstance(failed.exception, UserError) and "missing" in str(failed.exception)


def meta(number: int) -> dict[str, object]:
    """What img2dataset writes of a sample."""
    return {
        "url": f"http://x/{number}.jpg",
        "caption": f"subject {number}",
        "key": f"{number:09d}",
        "status": "success",
    }


def test_the_output_of_img2dataset_is_known_in_all_its_formats(tmp_path: Path):
    rows = [meta(number) for number in range(6)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    names = [f"{row['key']}.jpg" for row in rows]
    for number, name in enumerate(names):
        add(tmp_path / "files/00000", name, f"subject {number}", picture(number), format="JPEG")
        (tmp_path / "files/00000" / name).with_suffix(".json").write_text(json.dumps(rows[number]))
    contents = [(tmp_path / "files/00000" / name).read_bytes() for name in names]
    tar(tmp_path / "tars/00000.tar", *(m for n, c in zip(names, contents, strict=True) for m in told(n, c)))
    for folder in ("files", "tars"):
        table(tmp_path / folder / "00000.parquet", **columns)
        (tmp_path / folder / "00000_stats.json").write_text("{}")
    table(tmp_path / "tables/00000.parquet", **columns, jpg=contents)
    table(tmp_path / "addresses/00000.parquet", **columns)
    kinds = {"files": "folder", "tars": "webdataset", "tables": "parquet", "addresses": "parquet"}
    assert {folder: source_of(str(tmp_path / folder)) for folder in kinds} == kinds
    report = draw_sheet(data_in(tmp_path / "files"), 2, tmp_path / "sheet.png")
    assert report["kept"] == 6
    assert {kind: found["count"] for kind, found in report["passed_over"].items()} == {".json": 7, ".parquet": 1}


def told(name: str, content: bytes) -> list[tuple[str, bytes]]:
    return [(name, content), (name.replace("jpg", "txt"), b"words")]


def test_pictures_that_a_base_would_enlarge_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(4):
        add(tmp_path / "in", f"{number}.png", f"subject {number}", picture(number, (64, 80)))
    draw_sheet(data_in(tmp_path / "in"), 2, tmp_path / "sheet.png", {"sdxl": 1024, "emoji": 64})
    printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if line.startswith("warning: ")] == [
        "warning: 2 of 2 pictures are enlarged for sdxl up to 16 times: their shorter side is far below its 1024 "
        "pixels; data.min_side: 1024 drops them (it is 16)"
    ]
