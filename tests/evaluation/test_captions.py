"""Captions and seeds that something is chosen by, apart from those that are reported on."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from lcmlora.data.sources.source import Record, write_records
from lcmlora.errors import UserError
from lcmlora.evaluation.sets.captions import choosing, choosing_seeds, reporting, reporting_seeds


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
