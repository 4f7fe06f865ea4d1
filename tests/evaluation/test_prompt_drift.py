from dataclasses import asdict

import pytest
import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.evaluation.sets import prompt_drift
from lcmlora.evaluation.sets.prompt_drift import compare


def vectors(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64) + shift


def test_undrifted_prompts_raise_an_alarm_at_the_rate_that_was_asked_for():
    """Of 80 comparisons at a rate of 0.2, 16 in the mean with a standard deviation of 3.6."""
    alarms = sum(compare(vectors(80, 2 * s), vectors(30, 2 * s + 1), 0.2, draws=49).drifted for s in range(80))
    assert 5 <= alarms <= 27


def test_prompts_of_another_distribution_are_found_also_where_their_mean_is_the_same():
    captions = vectors(200, 1)
    moved = compare(captions, vectors(60, 2, shift=0.8), 0.01)
    assert moved.drifted and moved.distance > moved.threshold and moved.p_value == 1 / 2000
    wider = compare(captions, 1.7 * vectors(60, 3), 0.01)
    assert wider.drifted
    same = compare(captions, vectors(60, 4), 0.01)
    assert not same.drifted and same.distance <= same.threshold and same.p_value > 0.01


def test_sums_of_the_kernel_give_the_discrepancy_that_its_definition_gives():
    captions, order = vectors(30, 5), torch.randperm(30, generator=torch.Generator().manual_seed(0))
    kernel = prompt_drift._kernel(captions, captions)
    by_sums = prompt_drift._held_out_discrepancy(kernel, kernel.sum(1), order[:12])
    assert by_sums.item() == pytest.approx(prompt_drift._discrepancy(kernel, order[12:], order[:12]).item())


def test_a_comparison_is_the_same_each_time_and_needs_enough_captions():
    assert asdict(compare(vectors(80, 1), vectors(40, 2), 0.05)) == asdict(
        compare(vectors(80, 1), vectors(40, 2), 0.05)
    )
    with pytest.raises(ValueError, match="expected 80 captions or more"):
        compare(vectors(79, 1), vectors(40, 2), 0.05)


def test_texts_are_compared_by_the_bases_own_encoder_and_each_counts_once(base: LoadedBase):
    captions = [f"red apple {number}" for number in range(120)]
    asked = [f"{word} {number} on the moon" for number in range(30) for word in ("tree", "fruit")]
    found = prompt_drift.measure(base, [*captions, *captions], [*asked, *asked, " "], 0.01)
    assert (found.captions, found.prompts, found.drifted) == (120, 60, True)
    like = prompt_drift.measure(base, captions, captions[::2], 0.01)
    assert not like.drifted
    rows = prompt_drift.embed(base, captions[:3])
    assert rows.shape[0] == 3 and rows.dtype == torch.float64
    assert torch.allclose(rows, prompt_drift.embed(base, captions[:20])[:3])  # whatever they are encoded with
    for few_captions, few_prompts in ((captions[:99], asked), (captions, asked[:49])):
        with pytest.raises(prompt_drift.TooFew, match="too few to compare"):
            prompt_drift.measure(base, few_captions, few_prompts, 0.01)
