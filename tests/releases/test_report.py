from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcmlora.adapters.metadata import read_sampler
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.releases.bundle import Provenance
from lcmlora.releases.clients import Student, recommended_steps
from lcmlora.releases.pages import report
from lcmlora.releases.pages.plots import Point, chart
from lcmlora.releases.pages.report import fixed, milliseconds
from tests.support import client_schedules

BASE = Base(source="bases/mini", resolution=16, license="apache-2.0")
PROMPTS = ["red apple", "<script>alert('x')</script> & \"pear\""]
COSTS = {"teacher@50": 100, "ddim@1": 2, "ddim@2": 4, "dpm++@2": 4, "student@1": 1, "student@2": 2, "student@4": 4}


def minimal() -> dict[str, Any]:
    """Figures without anything that an evaluation may leave out."""
    return {
        "features": {"name": "efficientnet-lite0", "dimensions": 320, "distance": "frechet"},
        "pictures": 512,
        "seed": 1000,
        "floor": 118.2,
        "excess": {
            "teacher": 0.0,
            "ddim@1": 1098.0,
            "ddim@2": 444.6,
            "dpm++@2": 456.0,
            "student@1": 627.9,
            "student@2": 166.6,
            "student@4": -12.4,
        },
        "distance_teacher": {"teacher": 118.2, "student@4": 105.8},
        "distance_real": None,
        "distance_real_missing": "24 real pictures are too few",
        "retrieval": {key: 0.5 if key == "teacher@50" else 0.4 for key in COSTS},
        "seconds_per_picture": {"student@4": 0.02},
        "network_evaluations": COSTS,
    }


def whole() -> dict[str, Any]:
    """Figures of an evaluation with all of its parts."""
    style = {"alone/ddim@2": 830.1, "alone/dpm++@2": 901.0, "accelerated@4": 512.3, "adapter@4": 500.0}
    return minimal() | {
        "prompts": 45,
        "real_pictures": 500,
        "reference_digest": "e" * 64,
        "intervals": {"level": 0.95, "resamples": 200, "excess": {"student@4": [-30.0, 9.0]}, "retrieval": {}},
        "advantage": {
            "student@4": {
                "rival": "ddim@2",
                "network_evaluations": 4,
                "difference": -457.0,
                "interval": [-501.0, -411.0],
            }
        },
        "diversity": {"real": 0.7, "teacher@50": 0.6, "student@4": 0.45},
        "latency": {
            "seconds": {"teacher@50": {"p50": 0.3, "p95": 0.35}, "student@4": {"p50": 0.02, "p95": 0.03}},
            "repeats": 20,
            "batch": 1,
            "device": "cpu",
            "threads": 2,
        },
        "scores": {"clip-score/ViT-L-14": {"student@4": 24.125}},
        "guidance": {
            "steps": 4,
            "scales": [1, 1.5],
            "network_evaluations": [4, 8],
            "excess": [69.2, 80.0],
            "retrieval": [0.4, 0.41],
            "diversity": [0.45, 0.4],
        },
        "variations": {
            "noto-v1": {
                "kind": "style",
                "pictures": 1024,
                "real_pictures": 1080,
                "seed": 1001,
                "weights": [0.8, 1.0],
                "distance_real": style,
                "intervals": {"accelerated@4": [480.0, 540.0]},
                "retrieval": dict.fromkeys(style, 0.3),
                "network_evaluations": dict.fromkeys(style, 4),
                "claims": [
                    {
                        "claim": "closer to the style than alone",
                        "evaluations": 4,
                        "accelerated": 512.3,
                        "other": 830.1,
                        "other_key": "alone/ddim@2",
                        "difference": -317.8,
                        "interval": [-350.0, -280.0],
                        "holds": True,
                    },
                    {
                        "claim": "closer to the style than without it",
                        "evaluations": 4,
                        "accelerated": 512.3,
                        "other": 500.0,
                        "other_key": "adapter@4",
                        "difference": 12.3,
                        "interval": [-9.0, 30.0],
                        "holds": False,
                    },
                ],
            }
        },
        "weights": {
            "style": "noto-v1",
            "steps": 4,
            "pictures": 512,
            "style_weights": [0, 0.8],
            "adapter_weights": [0, 0.5, 1],
            "distance_real": [[900.0, 800.0, 700.0], [850.0, 600.0, 512.0]],
            "retrieval": [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]],
        },
    }


def searched() -> dict[str, Any]:
    """Figures of today: solvers by network evaluations with the settings that were found, and all comparisons."""
    sets = {"teacher@50": 100, "ddim@4": 4, "dpm++@4": 4, "student@4": 4}
    settings = {"steps": 4, "guidance_scale": 1, "spacing": "trailing", "karras": False, "final": "zero"}
    won = {"rival": "dpm++@4", "network_evaluations": 4, "difference": -209.0, "interval": [-230.0, -190.0]}
    figures = minimal() | {
        "prompts": 29,
        "excess": {"teacher": 0.0, "ddim@4": 330.0, "dpm++@4": 290.0, "student@4": 81.0},
        "distance_teacher": {"teacher": 118.2, "ddim@4": 448.2, "dpm++@4": 408.2, "student@4": 199.2},
        "distance_real": {"teacher@50": 561.0, "ddim@4": 820.0, "dpm++@4": 790.0, "student@4": 610.0},
        "distance_real_missing": None,
        "retrieval": dict.fromkeys(sets, 0.4),
        "diversity": dict.fromkeys(sets, 0.44),
        "network_evaluations": sets,
        "baselines": {
            "ddim@4": settings | {"solver": "ddim", "steps": 2, "guidance_scale": 3.0, "spacing": "leading"},
            "dpm++@4": settings | {"solver": "dpm++"},
        },
        "solvers_chosen_on": "validation",
        "intervals": {
            "level": 0.95, "resamples": 200, "captions": 29, "excess": {"student@4": [70.0, 92.0]}, "retrieval": {},
            "distance_real": {"student@4": [580.0, 640.0]},
        },
        "advantage": {"student@4": won},
        "advantage_at_steps": {"student@4": won | {"difference": -200.0}},
        "savings": {
            "student@4": {"evaluations": 4, "factor": 2.13, "relation": "equal", "interval": [1.9, 2.4]}
        },
        "check": {
            "features": {"name": "scattering/192@full-size", "dimensions": 192},
            "floor": 1.5,
            "excess": {"ddim@4": 3.0, "dpm++@4": 4.0, "student@4": 0.75},
            "advantage": {"student@4": won | {"rival": "ddim@4", "difference": -2.25, "interval": [-3.0, -1.5]}},
        },
        "worst": {
            "student": "student@4", "rival": "dpm++@4", "of": 29,
            "captions": [
                {
                    "caption": "wombat", "pictures": 18, "student": 6.5, "rival": 7.5, "teacher": 1.25,
                    "retrieval": 0.1, "teacher_retrieval": 0.9,
                }
            ],
        },
    }  # fmt: skip
    own = {"pictures": 512, "prompts": 2, "real_pictures": 0, "distance_real_missing": "the data are prompts"}
    return figures | {
        "own_prompts": figures | own | {"distance_real": None, "excess": {"student@4": 66.0, "dpm++@4": 99.0}}
    }


def write_searched_pictures(folder: Path, side: int = 16) -> Path:
    """Writes the thumbnails that `searched` speaks of."""
    for group, rows, prompts in (
        ("", 2, PROMPTS),
        ("@worst", 1, ["wombat"]),
        ("@own-prompts", 2, ["my cat", "my dog"]),
    ):
        pictures = folder / "pictures" / group
        pictures.mkdir(parents=True)
        (pictures / "prompts.json").write_text(json.dumps({"prompts": prompts, "side": side}))
        names = ["teacher@50", "dpm++@4", "student@4"] + (["ddim@4"] if group != "@worst" else [])
        for i, key in enumerate((*names, "real") if group != "@own-prompts" else names):
            _sheet(1, rows, side, 10 * len(group) + i).save(pictures / f"{key}.png")
    return folder


def provenance(**changes: Any) -> dict[str, Any]:
    proof = {"error": 6.7e-7, "effect": 0.59, "tensors": 258}
    return {
        "model": "mini",
        "sha256": "27f8cb2a9bc4" + "0" * 52,
        "base": {"source": "bases/mini", "revision": None, "digest": "b" * 64},
        "resolution": 16,
        "sampler": {"scheduler": "TCDScheduler", "gamma": 0.3, "grid": 20},
        "data_digest": "d" * 64,
        "seed": 0,
        "params": {"gate": {"steps": 4, "min_retrieval": 0.8}, "distill": {"rank": 64}},
        "versions": {"torch": "2.13.0"},
        "git": {"commit": "c" * 40, "dirty": False},
        "gate": {"passed": True, "failures": []},
        "reloaded": proof,
        "kohya": {"file": "lcm-lora-mini.safetensors", "sha256": "f" * 64, "reloaded": proof},
    } | changes


def write_pictures(folder: Path, side: int = 16) -> Path:
    """Writes all rows of thumbnails that `whole` speaks of: each picture has a colour of its own."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    (pictures / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "side": side}))
    for i, key in enumerate(("real", *COSTS, "guidance@1", "guidance@1.5")):
        _sheet(1, 2, side, i).save(pictures / f"{key}.png")
    (pictures / "noto-v1").mkdir()
    for i, key in enumerate(("real", "alone-ddim@2", "alone-dpm++@2", "accelerated@4", "adapter@4")):
        _sheet(1, 2, side, 40 + i).save(pictures / "noto-v1" / f"{key}.png")
    _sheet(3, 2, side, 80).save(pictures / "weights.png")
    return folder


def _sheet(columns: int, rows: int, side: int, first: int) -> Image.Image:
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i in range(columns * rows):
        x, y = i % columns * side, i // columns * side
        sheet.paste((first, i, 7), (x, y, x + side, y + side))
    return sheet


def render(figures: dict[str, Any], *folders: Path, base: Base = BASE, **changes: Any) -> str:
    metrics, made = Metrics.parse(figures, "metrics.json"), Provenance.parse(provenance(**changes), "provenance.json")
    assert made.sampler is not None
    sampler = read_sampler(made.sampler.plain(), "provenance.json")
    return report.render_report(
        "mini",
        metrics,
        made,
        folders if len(folders) > 1 else folders[0],
        base=base,
        kohya_file="lcm-lora-mini.safetensors",
        student=Student.of(sampler, client_schedules.schedule(), recommended_steps(metrics)),
    )


class Reader(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    @property
    def text(self) -> str:
        """The words on one line, with the marks of a keyboard for those of a printer."""
        marks = {"\u00ad": "", "\u2019": "'", "\u2212": "-", "\u00d7": "x"}
        return " ".join("".join(self.words).translate(str.maketrans(marks)).split())

    def attributes(self, tag: str, name: str) -> list[str]:
        return [value for t, attributes in self.tags if t == tag and (value := attributes.get(name)) is not None]

    @property
    def sections(self) -> list[str]:
        return self.attributes("section", "id")


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "evaluation")


def test_a_whole_evaluation_has_all_sections_in_order_and_the_contents_lead_to_them(evaluation: Path) -> None:
    seen = Reader(render(whole(), evaluation))
    middle = ["guidance", "variation-1", "weights", "diversity", "latency"]
    first = ["figures", "costs", "distances", "pictures"]
    assert seen.sections == [*first, *middle, "table", "use", "limits", "provenance"]
    assert [link for link in seen.attributes("a", "href") if link.startswith("#")] == [f"#{s}" for s in seen.sections]


def test_sections_without_figures_are_left_out(evaluation: Path) -> None:
    bare = ["figures", "distances", "pictures", "table", "use", "limits", "provenance"]
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
    assert "25x fewer network evaluations" in head and "20.0 ms against 300 ms (p50, cpu), 15.0 times as fast" in head


def test_solvers_are_named_with_their_settings_and_cost_is_counted_in_three_ways(tmp_path: Path) -> None:
    text = Reader(render(searched(), write_searched_pictures(tmp_path / "evaluation"))).text
    head = text[: text.index("The gate was passed")]
    assert "best solver at as many network evaluations, DPM-Solver++, 4 evaluations (4 steps, unguided)" in head
    assert "For the same distance the best solvers take 2.1 (1.9 to 2.4) times as many network evaluations." in head
    assert "Second features agree on the rank" in head
    costs = text[text.index("Cost, three ways A solver") : text.index("Two distances To the teacher")]
    assert "on validation captions and on seeds that no figure here comes from." in costs
    assert "best solver of as many evaluations" in costs and "In equal steps Most papers compare so." in costs
    assert "-209" in costs and "-200" in costs and "2.1x1.9 to 2.4" in costs
    on_test = searched() | {"solvers_chosen_on": "test"}
    assert "to the solvers' advantage" in Reader(render(on_test, tmp_path / "evaluation")).text


def test_both_distances_and_the_second_features_stand_side_by_side(tmp_path: Path) -> None:
    figures, folder = searched(), write_searched_pictures(tmp_path / "evaluation")
    text = Reader(render(figures, folder)).text
    both = text[text.index("Two distances To the teacher") : text.index("Second features The same")]
    row = both[both.index("student, 4 steps") :]
    assert row.replace(" ", "").startswith("student,4steps8170to92610580to6400.4000.440")
    second = text[text.index("Second features The same") : text.index("Pictures The first")]
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
    _sheet(1, 3, 16, 0).save(evaluation / "pictures" / "ddim@2.png")
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
