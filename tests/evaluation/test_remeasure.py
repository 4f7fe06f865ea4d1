"""A champion measured again on the reference of a new candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcmlora import bases
from lcmlora.config import Data, Gate
from lcmlora.errors import UserError
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import against, incomparable
from lcmlora.evaluation.remeasure import measure_again
from lcmlora.registry.references import Places, open_adapter
from tests.evaluation.conftest import CPU, made_of, settings

pytestmark = pytest.mark.usefixtures("small_features")


def again(base_folder: Path, adapter: Path, pictures: Path, reference: Path, root: Path) -> Metrics:
    base = bases.load("mini", made_of(base_folder), base_folder, device=CPU)
    found = open_adapter(str(adapter), Places(root))
    assert found.sampler
    known = (found.shown, found.weights, found.base, found.sampler)
    return measure_again(base, made_of(base_folder), *known, settings(), 4, pictures, reference, root / "again")


def test_the_figures_are_those_of_an_evaluation_and_can_be_compared_with_it(
    base: bases.LoadedBase,
    base_folder: Path,
    adapter: Path,
    data: Data,
    pictures: Path,
    reference: Path,
    tmp_path: Path,
) -> None:
    measured = again(base_folder, adapter, pictures, reference, tmp_path)
    (tmp_path / "evaluating").mkdir()
    files = (tmp_path / "evaluation", tmp_path / "metrics.json", tmp_path / "steps.csv", tmp_path / "timings")
    whole = evaluate_student(base, adapter, data, settings(), pictures, reference, tmp_path / "evaluating", *files)
    figures, expected = measured.plain(), whole.plain()
    for key in ("excess", "retrieval"):
        assert figures[key]["student@4"] == expected[key]["student@4"]
        assert figures["intervals"][key]["student@4"] == expected["intervals"][key]["student@4"]
    assert measured.adapter == whole.adapter
    assert incomparable(whole, measured) is None
    assert against(whole, measured, Gate(steps=4, min_retrieval=0.5), "lcm-lora-mini/1") == []
    assert not (tmp_path / "again").exists()


def test_an_adapter_of_another_base_is_refused_by_digest(
    base_folder: Path, adapter: Path, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    facts = json.loads((adapter / "config.json").read_text())
    facts["base"]["digest"] = "0" * 64
    (adapter / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"was made for .* \(digest 000000000000\.\.\.\)"):
        again(base_folder, adapter, pictures, reference, tmp_path)
