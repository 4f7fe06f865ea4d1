"""What an evaluation compares besides distances: the worst captions, and prompts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcmlora import bases
from lcmlora.config import Data
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons.worst import worst_captions
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.figures import Key, Metrics
from lcmlora.evaluation.image_sets import draw, read_thumbnails, thumbnails_path
from lcmlora.evaluation.reference import draw_reference
from lcmlora.evaluation.sets.own_prompts import read_own_prompts
from tests.evaluation.conftest import settings

pytestmark = pytest.mark.usefixtures("small_features")


def run(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path, **changes: Any
) -> tuple[Metrics, Path]:
    """Evaluates into the folder in which the adapter lies; returns the metrics and that folder."""
    root = adapter.parent
    (root / "evaluating").mkdir(exist_ok=True)
    places = (root / "evaluating", root / "evaluation", root / "metrics.json", root / "steps.csv", root / "timings")
    return evaluate_student(base, adapter, data, settings(**changes), pictures, reference, *places), root / "evaluation"


def test_the_worst_captions_are_those_whose_pictures_moved_and_are_told_with_the_rivals() -> None:
    shown = [caption for _ in range(4) for caption in ("owl", "fox", "ant")]
    generator = torch.Generator().manual_seed(0)
    places = {"owl": [9.0, 0.0, 0.0], "fox": [0.0, 9.0, 0.0], "ant": [0.0, 0.0, 9.0]}

    def drawn(moved: dict[str, float]) -> torch.Tensor:
        rows = [torch.tensor(places[caption]) + moved.get(caption, 0.0) for caption in shown]
        return torch.stack(rows) + 0.1 * torch.randn(12, 3, generator=generator)

    teacher, gallery = Key("teacher@50"), Key("gallery")
    sets = {teacher: drawn({}), Key("teacher@50/again"): drawn({}), gallery: drawn({})}
    sets |= {Key("student@4"): drawn({"fox": 4.0, "ant": 1.0}), Key("ddim@4"): drawn({"owl": 2.0})}
    metrics = Metrics.parse(
        {
            "features": {"name": "three"}, "pictures": 12, "seed": 0, "floor": 1.0, "excess": {"student@4": 1.0},
            "retrieval": {"teacher@50": 1.0}, "network_evaluations": {"student@4": 4},
            "advantage": {"student@4": {"rival": "ddim@4", "network_evaluations": 4, "difference": 1.0}},
        },
        "metrics",
    )  # fmt: skip
    found = worst_captions(metrics, sets, shown, shown, Key("student@4"), 2)
    assert found is not None and (found.student, found.rival, found.of) == ("student@4", "ddim@4", 3)
    assert [(each.caption, each.pictures) for each in found.captions] == [("fox", 4), ("ant", 4)]
    fox, ant = found.captions
    assert fox.student == pytest.approx(4 * 3**0.5, abs=0.2) and ant.student == pytest.approx(3**0.5, abs=0.2)
    assert fox.rival is not None and max(fox.rival, fox.teacher) < 0.3
    assert fox.teacher_retrieval == 1.0
    assert worst_captions(metrics, sets, shown, shown, Key("student@8"), 2) is None
    assert worst_captions(metrics, sets, shown, shown, Key("student@4"), 0) is None


def test_the_pictures_of_the_worst_captions_are_pictures_that_were_measured(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    metrics, folder = run(base, adapter, data, pictures, reference, worst_captions=2)
    worst = metrics.worst
    assert worst is not None and worst.student == "student@4" and len(worst.captions) == 2
    assert worst.captions[0].student >= worst.captions[1].student
    names = {path.stem for path in (folder / "pictures/@worst").glob("*.png")}
    assert names == {"student@4", "teacher@6", "real", worst.rival}
    prompts = [each.caption for each in worst.captions]
    # The set's first pictures show the captions in their order, from the same noise.
    rows = settings().grid_rows
    firsts = {key: read_thumbnails(thumbnails_path(folder, key)) for key in ("student@4", "teacher@6")}
    order = _prompts(reference)
    for place, caption in enumerate(prompts):
        if (number := order.index(caption)) < rows:
            for key, strip in firsts.items():
                kept = read_thumbnails(thumbnails_path(folder, key, "@worst"))[place]
                assert _near(kept, strip[number]), (key, caption)
    indices = [order.index(caption) for caption in prompts]
    teacher, _ = draw(base, prompts, SolverSettings.of("ddim", 6, 4.0), 1001, indices)
    kept_all = read_thumbnails(thumbnails_path(folder, "teacher@6", "@worst"))
    for tensor, image in zip(teacher, kept_all, strict=True):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3)
        assert (pixels.int() - tensor.permute(1, 2, 0).int()).abs().max() <= 1


def _prompts(reference: Path) -> list[str]:
    from lcmlora.evaluation.evaluate import read_reference

    return read_reference(reference).prompts


def _near(one: Any, other: Any) -> bool:
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_own_prompts_are_drawn_and_compared_as_the_captions_are(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("a red tree\nfruit on a tree\n\nan apple\nfruit on a tree\n")
    assert read_own_prompts(str(tmp_path / "own.txt")) == ["a red tree", "fruit on a tree", "an apple"]
    changes = {"prompts": str(tmp_path / "own.txt"), "solver_evaluations": (4,), "student_steps": (4,)}
    outputs = (tmp_path / "s", tmp_path / "reference", tmp_path / "timings")
    facts = draw_reference(base, data, settings(**changes), pictures, *outputs)
    kept = load_file(tmp_path / "reference/own-prompts/features.safetensors")
    both = load_file(tmp_path / "reference/features.safetensors")
    assert set(kept) == set(both) - {"real"}
    assert not any(torch.equal(kept[key], both[key]) for key in kept if key != "gallery")
    metrics, folder = run(base, adapter, data, pictures, tmp_path / "reference", **changes)
    own = metrics.own_prompts
    assert own is not None and (own.prompts, own.pictures, own.real_pictures) == (3, 20, 0)
    assert own.excess.keys() == metrics.excess.keys() and own.baselines == metrics.baselines == facts.baselines
    assert own.check and metrics.check and own.check.excess.keys() == metrics.check.excess.keys()
    assert own.excess["student@4"] != metrics.excess["student@4"]
    names = {path.name for path in (folder / "pictures/@own-prompts").iterdir()}
    assert names == {path.name for path in (folder / "pictures").iterdir() if path.is_file()} - {"real.png"}
    assert metrics == Metrics.read(adapter.parent / "metrics.json")
    with pytest.raises(UserError, match=r"was drawn with other own prompts \(evaluation\.prompts\); draw it again"):
        (tmp_path / "own.txt").write_text("a red tree\n")
        run(base, adapter, data, pictures, tmp_path / "reference", **changes)
    with pytest.raises(UserError, match=r"evaluation\.prompts: .*own\.md: expected a file that ends in \.txt"):
        (tmp_path / "own.md").write_text("a red tree\n")
        read_own_prompts(str(tmp_path / "own.md"))
