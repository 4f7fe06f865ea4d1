"""Captions and seeds that something is chosen by, apart from those that are reported on."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.choosing import Judge
from lcmlora import bases
from lcmlora.config import Data
from lcmlora.data.sources.source import Record, write_records
from lcmlora.errors import UserError
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.reference import Reference, choose_real, draw_reference
from lcmlora.evaluation.sets.captions import choosing, choosing_seeds, reporting, reporting_seeds
from tests.evaluation.conftest import CPU, made_of, settings


def test_no_caption_is_both_chosen_by_and_reported_on(pictures: Path) -> None:
    chosen, reported = choosing(pictures), reporting(pictures)
    assert (len(chosen.prompts), len(reported.prompts)) == (2, 4)
    assert not set(chosen.prompts) & set(reported.prompts)
    assert {record.caption for record in chosen.records} == set(chosen.prompts)
    assert {record.caption for record in reported.records} == set(reported.prompts)


@pytest.mark.parametrize("seed", [0, 7, 1000, 2**31])
def test_no_seed_is_both_chosen_by_and_reported_on(seed: int) -> None:
    assert astuple(reporting_seeds(seed)) == (seed, seed + 1, seed + 2)
    assert not set(astuple(reporting_seeds(seed))) & set(astuple(choosing_seeds(seed)))


def test_pictures_that_were_prepared_before_tell_to_prepare_again(tmp_path: Path) -> None:
    write_records(tmp_path / "validation.jsonl", [Record("a.png", "a fox", "00", 8, 8)])
    with pytest.raises(UserError, match=r"test\.jsonl: is missing, because .*; run `lcmlora prepare`"):
        reporting(tmp_path)


def test_no_test_captions_are_an_error_and_no_validation_captions_are_none(tmp_path: Path) -> None:
    for name in ("validation", "test"):
        write_records(tmp_path / f"{name}.jsonl", [])
    assert choosing(tmp_path) == ([], [])
    with pytest.raises(UserError, match=r"test\.jsonl: holds no pictures to compare with; raise data\.test"):
        reporting(tmp_path)
    with pytest.raises(UserError, match=r"no such list of pictures; run `lcmlora prepare`"):
        choosing(tmp_path / "nowhere")


def measured(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, root: Path
) -> tuple[Reference, bytes, Metrics]:
    """Draws the reference and evaluates; returns reference.json, the bytes of its features, and the metrics."""
    searched = settings(
        solvers=("ddim",), solver_evaluations=(2,), guidance_scales=(1.0, 4.0), choosing_pictures=4, student_steps=(2,)
    )
    root.mkdir()
    facts = draw_reference(base, data, searched, pictures, root / "drawn", root / "reference", root / "timings")
    files = (root / "evaluation", root / "metrics.json", root / "steps.csv", root / "timings")
    (root / "evaluating").mkdir()
    metrics = evaluate_student(base, adapter, data, searched, pictures, root / "reference", root / "evaluating", *files)
    return facts, (root / "reference" / "features.safetensors").read_bytes(), metrics


def with_validation(pictures: Path, records: list[Record], folder: Path) -> Path:
    """Writes the pictures with other validation captions to a folder, and returns it."""
    folder.mkdir()
    write_records(folder / "test.jsonl", reporting(pictures).records)
    write_records(folder / "validation.jsonl", records)
    return folder


def test_the_order_of_the_choosing_captions_changes_no_figure_and_other_ones_change_only_what_was_chosen(
    small_features: None, base_folder: Path, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    base = bases.load("mini", made_of(base_folder), base_folder, device=CPU)
    records = choosing(pictures).records
    shuffled = random.Random(0).sample(records, len(records))
    others = [Record(f"{i}", f"food {word}", f"{i:02d}", 8, 8) for i, word in enumerate(("tree", "apple", "fruit"))]
    assert shuffled != records
    facts, features, metrics = measured(base, adapter, data, pictures, tmp_path / "a")
    again = measured(base, adapter, data, with_validation(pictures, shuffled, tmp_path / "in-b"), tmp_path / "b")
    assert facts.search is not None and facts.search.captions == 2
    assert set(facts.prompts) == set(reporting(pictures).prompts)
    assert (again[0], again[1], again[2]) == (facts, features, metrics)
    changed = measured(base, adapter, data, with_validation(pictures, others, tmp_path / "in-c"), tmp_path / "c")
    assert changed[0].search is not None and changed[0].search.trials != facts.search.trials
    sets, found = (load_file(tmp_path / name / "reference/features.safetensors") for name in "ac")
    apart = {key for key in sets if not sets[key].equal(found[key])}
    assert apart <= {"ddim@2"}  # drawn with the settings that were chosen
    assert changed[2].excess["student@2"] == metrics.excess["student@2"] and changed[2].floor == metrics.floor


def test_a_benchmark_chooses_and_reports_on_captions_and_seeds_apart(
    base_folder: Path, adapter: Path, data: Data, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    def load() -> bases.LoadedBase:
        return bases.load("mini", made_of(base_folder), base_folder, device=CPU)

    judge = Judge(load, data, settings(), pictures, reference, tmp_path / "choosing")
    (tmp_path / "work").mkdir()
    found = judge.figures(adapter, tmp_path / "work")
    assert (found["choosing"]["prompts"], found["reporting"]["prompts"]) == (2, 4)
    assert (found["choosing"]["seed"], found["reporting"]["seed"]) == (2000, 1000)
    (chosen_by,) = (tmp_path / "choosing").glob("*/reference")
    prompts = set(Reference.read(chosen_by / "reference.json").prompts)
    assert prompts == set(choosing(pictures).prompts)
    assert not prompts & set(Reference.read(reference / "reference.json").prompts)


@pytest.mark.parametrize(("captions", "most"), [(300, 40), (40, 40), (7, 40), (7, 1000), (1, 5)])
def test_of_a_long_list_what_is_compared_with_is_what_the_whole_list_gives(
    captions: int, most: int, tmp_path: Path
) -> None:
    numbers = random.Random(captions)
    records = [
        Record(f"{i}.png", f"caption {int(captions * numbers.random() ** 2)}", numbers.randbytes(32).hex(), 8, 8)
        for i in range(600)
    ]
    for name in ("test.jsonl", "validation.jsonl"):
        write_records(tmp_path / name, records)
    whole, part, more = reporting(tmp_path), reporting(tmp_path, most), reporting(tmp_path, most + 30)
    assert part.prompts == choosing(tmp_path, most).prompts == more.prompts[:most] == whole.prompts[:most]
    for found in (part, more):
        assert choose_real(found.records, part.prompts, most) == choose_real(whole.records, part.prompts, most)
    for prompt in part.prompts:
        turns = -(-most // len(part.prompts))
        of_whole, of_part = ([r for r in found.records if r.caption == prompt] for found in (whole, part))
        assert of_part[:turns] == of_whole[:turns]
    assert len(part.records) <= 3 * most + 8 * len(part.prompts)
