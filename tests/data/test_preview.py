from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from lcmlora.cli import app
from lcmlora.data.preview import preview
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture

PARAMS = Path(__file__).parents[2] / "params.yaml"


def test_a_sheet_shows_pictures_with_captions_and_the_report_counts_all(tmp_path: Path):
    for number in range(6):
        add(tmp_path / "in", f"{number}.png", f"$subject {number}_{{" + " and more" * 40, picture(number, (40, 30)))
    add(tmp_path / "in", "small.png", "too small", picture(7, (8, 8)))
    add(tmp_path / "in", "broken.png", "broken", b"\x89PNG\r\n\x1a\nno more")
    report = preview(data_in(tmp_path / "in"), 5, tmp_path / "sheet.png")
    assert (report["read"], report["kept"]) == (8, 6)
    with Image.open(tmp_path / "sheet.png") as opened:
        assert opened.width == pytest.approx(4 * 2.4 * 110, abs=1)
        pixels = np.asarray(opened.convert("RGB"))
    assert (pixels[: len(pixels) // 2] != 255).any() and (pixels[len(pixels) // 2 :] != 255).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "sheet.png"]


def test_what_is_no_data_set_leaves_no_sheet(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        preview(data_in(tmp_path / "empty"), 12, tmp_path / "sheet.png")
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
