from __future__ import annotations

from pathlib import Path

from PIL import Image

from lcmlora.evaluation.charts import Row, curves, grid


def test_the_grid_puts_enlarged_pictures_below_their_method_and_beside_their_caption(tmp_path: Path) -> None:
    colours = {"teacher@50": ["#ff0000", "#00ff00"], "dpm++@4": ["#0000ff", "#ffff00"]}
    columns = {key: [Image.new("RGB", (64, 64), c) for c in row] for key, row in colours.items()}
    columns["dpm++@4"][0].putpixel((0, 0), (1, 2, 3))
    counts = {"teacher@50": "50 steps", "dpm++@4": "4 evaluations"}
    grid(["red apple", "a caption that is far too long for its place " * 5], columns, counts, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (150 + 2 * 134 + 6, 48 + 2 * 134)
        seen = [[sheet.getpixel((150 + 134 * x + 100, 48 + 134 * y + 100)) for y in (0, 1)] for x in (0, 1)]
        assert seen == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
        # A pixel of a small picture is a block of whole pixels, not smoothed.
        corner = [sheet.getpixel((150 + 134 + x, 48 + y)) for x in (0, 1, 2) for y in (0, 1, 2)]
        assert corner.count((1, 2, 3)) == 4 and corner.count((0, 0, 255)) == 5
        ink = [sheet.getpixel((x, 48 + y)) for x in range(140) for y in range(128)]
        assert 50 < sum(p != (255, 255, 255) for p in ink) < 3000  # the caption, and nothing over the pictures


def test_large_pictures_are_brought_down_to_a_readable_sheet(tmp_path: Path) -> None:
    columns = {"student@4": [Image.new("RGB", (512, 512), "#123456")]}
    grid(["a"], columns, {"student@4": "4 steps"}, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (150 + 262 + 6, 48 + 262)


def test_the_curves_take_a_method_at_or_below_the_floor(tmp_path: Path) -> None:
    rows = [Row("student", n, n, 1.0, "", "", "", 90 - n, 12.0 - n, 0.5) for n in (1, 2, 4, 16)]
    rows.append(Row("teacher", 100, 50, 5.0, "", "", "", 78, 0.0, 0.8))
    curves(rows, 78.0, tmp_path / "steps.png")
    curves(rows, 78.0, tmp_path / "again.png")
    assert (tmp_path / "steps.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.size == (936, 598)
