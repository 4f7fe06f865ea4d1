from __future__ import annotations

from pathlib import Path

from PIL import Image

from lcmlora.evaluation.charts import Column, Row, contact_sheet, curves


def _pictures(*colours: str, side: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), colour) for colour in colours]


def test_the_contact_sheet_puts_enlarged_pictures_below_their_method_and_beside_their_caption(tmp_path: Path) -> None:
    columns = [
        Column(_pictures("#ff0000", "#00ff00"), "teacher", "50 steps"),
        Column(_pictures("#0000ff", "#ffff00"), "DDIM", "2 steps, guidance 3, leading", "4 network evaluations"),
        Column(_pictures("#00ffff", "#ff00ff"), "student", "4 steps", "4 network evaluations", is_student=True),
    ]
    columns[1].pictures[0].putpixel((0, 0), (1, 2, 3))
    captions = ["red apple", "a caption that is far too long for its place " * 5]
    contact_sheet(captions, columns, tmp_path / "grid.png")
    top, lefts = 62 + 2 * 15, (150, 150 + 128 + 20, 150 + 2 * 128 + 20 + 6)  # the settings take two lines
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (lefts[-1] + 128 + 20, top + 2 * 134)
        seen = [[sheet.getpixel((left + 100, top + 134 * y + 100)) for y in (0, 1)] for left in lefts]
        assert seen == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)], [(0, 255, 255), (255, 0, 255)]]
        # A pixel of a small picture is a block of whole pixels, not smoothed.
        corner = [sheet.getpixel((lefts[1] + x, top + y)) for x in (0, 1, 2) for y in (0, 1, 2)]
        assert corner.count((1, 2, 3)) == 4 and corner.count((0, 0, 255)) == 5
        ink = [sheet.getpixel((x, top + y)) for x in range(140) for y in range(128)]
        assert 50 < sum(p != (255, 255, 255) for p in ink) < 3000  # the caption, and nothing over the pictures
        between = [sheet.getpixel((lefts[n] - 2, top + 130)) for n in (1, 2)]
        assert between == [(255, 255, 255), (250, 233, 231)]  # the student's column is tinted
        line = {sheet.getpixel((x, 26)) for x in range(lefts[1], lefts[2] + 128)}
        assert len(line) == 1 and line != {(255, 255, 255)}  # over both columns of the group


def test_large_pictures_are_brought_down_to_a_readable_sheet(tmp_path: Path) -> None:
    contact_sheet(["a"], [Column(_pictures("#123456", side=512), "student", "4 steps")], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (150 + 256 + 20, 62 + 15 + 262)


def test_the_curves_take_a_method_at_or_below_the_floor(tmp_path: Path) -> None:
    rows = [Row("student", n, n, 1.0, "", "", "", 90 - n, 12.0 - n, 0.5) for n in (1, 2, 4, 16)]
    rows.append(Row("teacher", 100, 50, 5.0, "", "", "", 78, 0.0, 0.8))
    curves(rows, 78.0, tmp_path / "steps.png")
    curves(rows, 78.0, tmp_path / "again.png")
    assert (tmp_path / "steps.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.size == (936, 598)
