"""Figures of every kind as plain data, their thumbnails, and the report page that is made of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from lcmlora.adapters.metadata import read_sampler
from lcmlora.config import Base
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import Metrics
from lcmlora.releases.bundle import Provenance
from lcmlora.releases.clients import Student, recommended_steps
from lcmlora.releases.pages import report
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


def write_searched_pictures(folder: Path, side: int = 16, rows: int = 2) -> Path:
    """Writes the thumbnails that `searched` speaks of, of so many captions."""
    captions = [*PROMPTS, *(f"caption {i}" for i in range(2, rows))]
    for group, prompts in (("", captions), ("@worst", ["wombat"]), ("@own-prompts", ["my cat", "my dog"])):
        pictures = folder / "pictures" / group
        pictures.mkdir(parents=True)
        (pictures / "prompts.json").write_text(json.dumps({"prompts": prompts, "side": side}))
        names = ["teacher@50", "dpm++@4", "student@4"] + (["ddim@4"] if group != "@worst" else [])
        for i, key in enumerate((*names, "real") if group != "@own-prompts" else names):
            sheet(1, len(prompts), side, 10 * len(group) + i).save(pictures / f"{key}.png")
    return folder


def provenance(**changes: Any) -> dict[str, Any]:
    """Returns provenance.json of a release, with changes."""
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
        sheet(1, 2, side, i).save(pictures / f"{key}.png")
    (pictures / "noto-v1").mkdir()
    for i, key in enumerate(("real", "alone-ddim@2", "alone-dpm++@2", "accelerated@4", "adapter@4")):
        sheet(1, 2, side, 40 + i).save(pictures / "noto-v1" / f"{key}.png")
    sheet(3, 2, side, 80).save(pictures / "weights.png")
    return folder


def sheet(columns: int, rows: int, side: int, first: int) -> Image.Image:
    """Returns pictures in rows, each of a colour of its own."""
    made = Image.new("RGB", (columns * side, rows * side))
    for i in range(columns * rows):
        x, y = i % columns * side, i // columns * side
        made.paste((first, i, 7), (x, y, x + side, y + side))
    return made


def render(
    figures: dict[str, Any],
    *folders: Path,
    base: Base = BASE,
    compatibility: Compatibility | None = None,
    **changes: Any,
) -> str:
    """Returns the report page of these figures, with changes of the provenance."""
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
        compatibility=compatibility,
        student=Student.of(sampler, client_schedules.schedule(), recommended_steps(metrics, {})),
    )


def _typed(text: str) -> str:
    """Returns a text on one line, with the marks of a keyboard for those of a printer."""
    marks = {"\u00ad": "", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u00d7": "x"}
    return " ".join(text.translate(str.maketrans(marks)).split())


class Reader(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.folded: list[str] = []  # the titles of what a reader opens
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "summary":
            self.folded.append(_typed(data))
        if self._open != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """The words on one line."""
        return _typed("".join(self.words))

    def attributes(self, tag: str, name: str) -> list[str]:
        return [value for t, attributes in self.tags if t == tag and (value := attributes.get(name)) is not None]

    @property
    def sections(self) -> list[str]:
        return self.attributes("section", "id")
