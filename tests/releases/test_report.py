from __future__ import annotations

import base64
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcmlora.errors import UserError
from lcmlora.releases.pages.numbers import fixed, milliseconds
from lcmlora.releases.pages.plots import Point, chart
from tests.support.releases import ADDITIONS
from tests.support.reports import (
    PROMPTS,
    Reader,
    minimal,
    render,
    searched,
    sheet,
    whole,
    write_pictures,
    write_searched_pictures,
)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "evaluation")


def test_a_whole_evaluation_has_all_sections_in_order_and_the_contents_lead_to_them(evaluation: Path) -> None:
    seen = Reader(render(whole(), evaluation))
    middle = ["guidance", "variation-1", "weights", "by-steps"]
    assert seen.sections == ["pictures", "figures", *middle, "limits", "use", "provenance"]
    assert [link for link in seen.attributes("a", "href") if link.startswith("#")] == [f"#{s}" for s in seen.sections]


def test_sections_without_figures_are_left_out(evaluation: Path) -> None:
    bare = ["pictures", "figures", "limits", "use", "provenance"]
    assert Reader(render(minimal(), evaluation)).sections == bare
    absent = {"variations": {}, "guidance": None, "weights": None, "diversity": {}, "latency": None, "scores": {}}
    assert Reader(render(minimal() | absent, evaluation)).sections == bare


def test_the_page_says_first_how_the_student_stands_against_the_best_solver_and_the_teacher(evaluation: Path) -> None:
    text = Reader(render(whole(), evaluation)).text
    head = text[: text.index("The gate was passed")]
    assert "27f8cb2a9bc4" in head
    assert "closer to the teacher's than those of the best solver" in head
    assert "-12 against 445" in head and "difference -457, 95% interval -501 to -411" in head
    assert "0.400 against 0.500" in head and "80% of it" in head
    assert (
        "25x fewer evaluations" in head
        and "4 network evaluations against the teacher's 100" in head
        and "20.0 ms against 300 ms (p50, cpu), 15.0 times as fast" in head
    )


def test_solvers_are_named_with_their_settings_and_cost_is_counted_in_three_ways(tmp_path: Path) -> None:
    text = Reader(render(searched(), write_searched_pictures(tmp_path / "evaluation"))).text
    head = text[: text.index("The gate was passed")]
    assert "best solver at as many network evaluations, DPM-Solver++, 4 evaluations (4 steps, unguided)" in head
    assert "For the same distance the best solvers take 2.1 (1.9 to 2.4) times as many network evaluations." in head
    assert "Second features agree on the rank" in head
    figures = text[text.index("Distance and retrieval Each") : text.index("Worst captions The")]
    assert "on validation captions and on seeds that no figure here comes from." in figures
    row = "4 DPM-Solver++ 4 steps, unguided 290 81 70 to 92 -209 -230 to -190 2.1x 1.9 to 2.4 agree 790 610 0.400 0.400"
    assert row.replace(" ", "") in figures.replace(" ", "")
    assert "In equal steps, as most papers compare" in figures and "-200" in figures
    on_test = searched() | {"solvers_chosen_on": "test"}
    assert "to the solvers' advantage" in Reader(render(on_test, tmp_path / "evaluation")).text


def test_the_teacher_stands_below_with_its_distance_to_real_pictures_and_its_retrieval(tmp_path: Path) -> None:
    text = Reader(render(searched(), write_searched_pictures(tmp_path / "evaluation"))).text.replace(" ", "")
    assert "100theteacher,in50stepswithguidance5610.400" in text


def test_second_features_have_a_column_and_a_table_of_their_own(tmp_path: Path) -> None:
    figures, folder = searched(), write_searched_pictures(tmp_path / "evaluation")
    text = Reader(render(figures, folder)).text
    second = text[text.index("By second features, scattering") : text.index("Worst captions The")]
    assert "scattering/192@full-size (192 dimensions)" in second and "as by the first features" in second
    assert "DDIM, 4 evaluations (2 steps, guidance 3, leading)" in second and "-3.00 to -1.50" in second
    figures["check"]["advantage"]["student@4"] |= {"difference": 2.25, "interval": [1.5, 3.0]}
    assert "the other way round" in Reader(render(figures, folder)).text
    del figures["check"]
    figures["check_missing"] = "20 pictures are too few"
    assert "hang on efficientnet-lite0 alone: 20 pictures are too few." in Reader(render(figures, folder)).text


def test_pictures_stand_beside_those_of_the_best_solver_of_as_many_evaluations(tmp_path: Path) -> None:
    seen = Reader(render(searched(), write_searched_pictures(tmp_path / "evaluation")))
    told = seen.attributes("img", "alt")
    solver = "DPM-Solver++, 4 evaluations (4 steps, unguided)"
    beside = [f"{who}: {PROMPTS[0]}" for who in ("real", "teacher, 50 steps", solver, "student, 4 steps")]
    assert told[:4] == beside
    assert [alt for alt in told if alt.endswith(": wombat")] == [each.replace(PROMPTS[0], "wombat") for each in beside]
    own = [alt for alt in told if alt.endswith(": my cat")]
    assert own == [each.replace(PROMPTS[0], "my cat") for each in beside[1:]]
    assert "Worst captions The 1 of 29 captions at which the student in 4 steps is farthest" in seen.text
    assert "wombat6.507.501.250.100.9018" in seen.text.replace(" ", "")
    assert "Your own prompts 512 pictures of 2 captions from evaluation.prompts" in seen.text


def test_all_methods_are_shown_by_network_evaluations_also_where_their_figures_count_steps(evaluation: Path) -> None:
    seen = Reader(render(minimal(), evaluation))
    shown = seen.text[seen.text.index("Every method at") :]
    assert shown.replace(" ", "").startswith(
        "Everymethodateverynumberofnetworkevaluationsredapplerealteacher,50steps1eval.2eval.4eval.student"
    )
    beside = len(PROMPTS) * 6  # real, teacher, and two pairs
    told = [alt.partition(":")[0] for alt in seen.attributes("img", "alt")[beside:]]
    students = [f"student, {steps}" for steps in ("1 step", "2 steps", "4 steps")]
    solvers = ["DDIM, 1 step", "DDIM, 2 steps", "DPM-Solver++, 2 steps"]
    assert told == 2 * ["real", "teacher, 50 steps", *students, *solvers]


def test_additions_that_failed_are_told_and_the_figures_of_all_are_folded(evaluation: Path) -> None:
    seen = Reader(render(minimal(), evaluation, compatibility=ADDITIONS))
    told = seen.text[seen.text.index("Together with additions The student") :]
    assert "Tried: style LoRA ink, weight 1, VAE in fp16." in told and "None failed" not in told
    assert "style LoRA ink, weight 1, student, 4 steps: excess 300 is more than 2 times the 88." in told
    assert "img2img 0.4 was not tried: the data are prompts, without real pictures." in told
    assert "styleLoRAink,weight1200300250to350failed" in told.replace(" ", "")
    assert "Excess distance with every addition" in seen.folded
    kept = {name: each for name, each in ADDITIONS.tried.items() if name == "nothing"}
    fine = ADDITIONS.model_copy(update={"tried": kept | {"plain": ADDITIONS.tried["nothing"]}})
    assert "Tried: nothing added. None failed." in Reader(render(minimal(), evaluation, compatibility=fine)).text


def test_what_a_reviewer_need_not_see_first_is_folded(tmp_path: Path) -> None:
    pictures = write_searched_pictures(tmp_path / "evaluation", rows=6)
    seen = Reader(render(searched(), pictures))
    assert {"3 more captions", "All figures, 4 rows", "Everything that went in"} <= set(seen.folded)
    assert {"With a style's LoRA", "MLflow", "lcmlora", "InvokeAI", "img2img and inpainting"} <= set(seen.folded)
    assert not [tag for tag, attributes in seen.tags if tag == "details" and "open" in attributes]


@pytest.mark.parametrize(
    ("interval", "said"),
    [([-9.0, 9.0], "includes zero"), ([3.0, 9.0], "farther from the teacher's"), (None, "No solver was compared")],
)
def test_a_student_that_does_not_win_is_not_praised(evaluation: Path, interval: list[float] | None, said: str) -> None:
    figures = whole()
    if interval:
        figures["advantage"]["student@4"]["interval"] = interval
    else:
        figures["advantage"] = {}
    text = Reader(render(figures, evaluation)).text
    assert said in text and "pictures are closer to the teacher's" not in text


def test_the_reasons_of_a_gate_that_was_not_passed_are_listed(evaluation: Path) -> None:
    failed = {"passed": False, "failures": ["student@4: too <far>", "student@4: retrieval too low"]}
    seen = Reader(render(whole(), evaluation, gate=failed))
    assert "The gate was not passed. student@4: too <far>student@4: retrieval too low" in seen.text
    assert "The gate was passed" not in seen.text


def test_claims_that_fail_are_said_beside_those_that_hold_and_again_among_the_limits(evaluation: Path) -> None:
    text = Reader(render(whole(), evaluation)).text
    assert "Holds: closer to the style than alone, at 4 network evaluations. Distance 512 against 830" in text
    assert (
        "Does not hold here: closer to the style than without it, at 4 network evaluations. Distance 512 against 500 "
        "(adapter without the style, 4 steps), difference +12, 95% interval -9 to 30, which includes zero." in text
    )
    doubtful = whole()
    doubtful["variations"]["noto-v1"]["claims"][0]["interval"] = [-650.0, 10.0]
    said = "Within chance: closer to the style than alone, at 4 network evaluations."
    assert said in Reader(render(doubtful, evaluation)).text and said not in text
    limits = text[text.index("Limits The adapter") :]
    assert "Does not hold for style noto-v1 at 4 network evaluations: closer to the style than without it." in limits
    assert "diversity in 4 steps is 75% of the teacher's" in limits and "retrieval is 80% of the teacher's" in limits


def test_nothing_is_loaded_from_outside_and_nothing_is_run(evaluation: Path) -> None:
    html = render(whole(), evaluation)
    seen = Reader(html)
    assert all(source.startswith("data:image/") for source in seen.attributes("img", "src"))
    assert all(link.startswith(("#", "data:")) for tag in ("a", "link") for link in seen.attributes(tag, "href"))
    loaders = {"script", "iframe", "object", "embed", "video", "audio", "source", "base", "use", "image"}
    assert not loaders & {tag for tag, _ in seen.tags}
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in seen.attributes("meta", "content")


def test_every_picture_is_told_to_those_who_cannot_see_it(evaluation: Path) -> None:
    seen = Reader(render(whole(), evaluation))
    images = [attributes for tag, attributes in seen.tags if tag == "img"]
    told = [attributes["alt"] for attributes in images]
    assert "student, 4 steps: red apple" in told and "DPM-Solver++, 2 steps: red apple" in told
    assert "real: red apple" in told and "teacher, 50 steps: red apple" in told
    assert "student, 4 steps, guidance scale 1.5: red apple" in told
    assert "noto-v1 accelerated, 4 steps: red apple" in told and "noto-v1 alone, DDIM, 2 steps: red apple" in told
    assert "noto-v1 weight 0.8, adapter weight 0.5, 4 steps: red apple" in told
    # Two prompts: real, teacher and two pairs side by side; real and 7 sets; 2 guidance scales; real and the three
    # parts of the style; and 2 x 3 weights.
    assert len(told) == 2 * (6 + 8 + 2 + 4) + 6 and all(told)
    assert all(attributes.get("aria-label") for tag, attributes in seen.tags if tag == "svg")


def test_pictures_are_those_of_their_method_and_prompt_to_the_last_bit(evaluation: Path) -> None:
    seen = Reader(render(whole(), evaluation))
    images = {a["alt"]: a["src"] for tag, a in seen.tags if tag == "img"}

    def colour(alt: str) -> Any:
        data = base64.b64decode(str(images[alt]).partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (16, 16)
            return picture.convert("RGB").getpixel((8, 8))

    assert colour("real: red apple") == (0, 0, 7)
    assert colour(f"DDIM, 1 step: {PROMPTS[1]}") == (2, 1, 7)
    assert colour("noto-v1 weight 0.8, adapter weight 1, 4 steps: red apple") == (80, 5, 7)


def test_large_pictures_are_brought_down(tmp_path: Path) -> None:
    seen = Reader(render(minimal(), write_pictures(tmp_path / "evaluation", side=512)))
    data = base64.b64decode(seen.attributes("img", "src")[0].partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (256, 256)


def test_captions_are_text_and_never_markup(evaluation: Path) -> None:
    html = render(whole(), evaluation)
    assert "<script" not in html and PROMPTS[1] in Reader(html).text


def test_the_same_inputs_give_the_same_bytes(evaluation: Path) -> None:
    assert render(whole(), evaluation) == render(json.loads(json.dumps(whole())), evaluation)


def test_tables_have_captions_and_header_cells_with_a_scope(evaluation: Path) -> None:
    seen = Reader(render(whole(), evaluation))
    assert all(attributes.get("scope") for tag, attributes in seen.tags if tag == "th")
    tables = [a.get("class") or "" for tag, a in seen.tags if tag == "table"]
    below_a_heading = len(PROMPTS)  # the grids of the prompts
    assert sum(tag == "caption" for tag, _ in seen.tags) == len(tables) - below_a_heading


def test_a_missing_row_of_thumbnails_is_named(evaluation: Path) -> None:
    missing = evaluation / "pictures" / "student@2.png"
    missing.unlink()
    with pytest.raises(UserError, match=re.escape(f"{missing}: no such file")):
        render(minimal(), evaluation)


def test_a_row_of_thumbnails_of_another_size_is_named_with_both_sizes(evaluation: Path) -> None:
    sheet(1, 3, 16, 0).save(evaluation / "pictures" / "ddim@2.png")
    with pytest.raises(UserError, match=r"ddim@2\.png: is 16 x 48 pixels, expected 1 x 2 pictures of 16"):
        render(minimal(), evaluation)


def test_a_study_may_keep_its_pictures_and_its_prompts_in_a_folder_of_its_own(evaluation: Path, tmp_path: Path) -> None:
    studied = tmp_path / "study"
    (studied / "pictures").mkdir(parents=True)
    for name in ("noto-v1", "weights.png", "guidance@1.png", "guidance@1.5.png"):
        (evaluation / "pictures" / name).rename(studied / "pictures" / name)
    (studied / "pictures" / "noto-v1" / "prompts.json").write_text('{"prompts": ["fox", "owl"]}')
    told = Reader(render(whole(), evaluation, studied)).attributes("img", "alt")
    assert "noto-v1 accelerated, 4 steps: owl" in told and "student, 4 steps, guidance scale 1: red apple" in told
    (studied / "pictures" / "weights.png").unlink()
    with pytest.raises(UserError, match=r"evaluation/pictures/weights\.png or .*study/pictures/weights\.png: no such"):
        render(whole(), evaluation, studied)


def test_a_chart_has_room_for_what_is_below_zero_and_keeps_its_names_apart() -> None:
    curves = {
        "student": [Point(1, 600.0, 550.0, 640.0, ""), Point(4, -12.0, -40.0, 9.0, "")],
        "ddim": [Point(2, 900.0, 900.0, 900.0, ""), Point(4, -11.0, -30.0, 8.0, "")],
        "dpm++": [Point(4, -10.0, -10.0, -10.0, "")],
    }
    drawn = chart(curves, {"teacher": 0.0}, None, 350, 340, 106)
    left, top, right, bottom = drawn.frame
    spots = [spot for line in drawn.lines for spot in line.spots]
    assert all(left <= x <= right and top <= high <= y <= low <= bottom for x, y, low, high, _ in spots)
    assert [text for _, text in drawn.columns] == ["1", "2", "4"]
    assert len({x for x, *_ in spots}) == len(spots)  # those of equal cost side by side
    heights = sorted(y for _, _, y in drawn.names)
    assert len(heights) == 4 and all(b - a >= 15.99 for a, b in pairwise(heights))
    assert top <= heights[0] and heights[-1] <= bottom


def test_numbers_have_a_true_minus_and_no_sign_at_zero() -> None:
    assert fixed(-12.44, 1) == "\N{MINUS SIGN}12.4" and fixed(3.0, 0, signed=True) == "+3"
    assert fixed(-0.004, 2) == "0.00" and fixed(None) == "\N{EN DASH}"
    assert [milliseconds(s) for s in (0.000123456, 0.0123456, 0.5, 12.0)] == ["0.123", "12.3", "500", "12000"]


def _alike(figures: dict[str, Any], value: float) -> dict[str, Any]:
    """Returns the figures with every measured number the same; counts and costs stay."""
    counted = ("network_evaluations", "level", "resamples", "steps", "repeats", "batch", "threads", "seed", "prompts")
    counted += ("pictures", "real_pictures", "dimensions", "scales", "weights", "style_weights", "adapter_weights")
    counted += ("evaluations",)

    def changed(key: str, found: Any) -> Any:
        if isinstance(found, dict):
            return {name: each if name in counted else changed(name, each) for name, each in found.items()}
        if isinstance(found, list):
            return [changed(key, each) for each in found]
        return value if isinstance(found, float) else found

    return {key: each if key in counted else changed(key, each) for key, each in figures.items()}


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_figures_without_any_spread_make_a_page(evaluation: Path, value: float) -> None:
    text = Reader(render(_alike(whole(), value), evaluation)).text
    assert "Distance and retrieval" in text and not re.search(r"\b(nan|inf)\b", text)
    assert ("was not measured: teacher@50 meets none of its captions" in text) == (value <= 0)


def test_one_caption_is_no_measure_of_retrieval(evaluation: Path) -> None:
    text = Reader(render(whole() | {"prompts": 1}, evaluation)).text
    assert "How often captions are met was not measured: there is one caption, which every picture has." in text
    assert "of 100 pictures; with the teacher" not in text and "of its caption retrieval" not in text
