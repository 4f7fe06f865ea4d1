"""Evaluations of few captions and few pictures: figures or a reason, nowhere a crash, a NaN or a claim."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmlora.config import Gate
from lcmlora.evaluation import charts
from lcmlora.evaluation.comparisons.measuring import measure
from lcmlora.evaluation.evaluate import plot_rows
from lcmlora.evaluation.figures import AGAIN, REAL, STUDENT, FeatureSet, Key, Metrics
from lcmlora.evaluation.gate import against, gate_failures
from lcmlora.evaluation.measures.distances import named
from lcmlora.evaluation.reference import Counts, Listed, Reference
from tests.releases.test_card import render

TEACHER = Key("teacher@50")
COUNTS = [
    (kind, captions, pictures, dimensions)
    for kind, captions, pictures, dimensions in itertools.product(("frechet", "cmmd"), (1, 2, 3), (1, 2, 5), (1, 2, 12))
    if captions * pictures >= max(2, named(kind).pictures_needed(dimensions))
]


def evaluation(
    kind: str,
    captions: int,
    pictures: int,
    dimensions: int,
    *,
    steps: tuple[int, ...],
    real: int,
    alike: bool = False,
    seed: int = 0,
) -> tuple[Reference, dict[Key, Tensor]]:
    """Returns the facts and the features of sets that differ by chance alone.

    Args:
        pictures: of each caption.
        steps: of the student, and evaluations of a solver.
        real: pictures of each caption; 0: the data are prompts.
        alike: whether all pictures are one.
    """
    generator = torch.Generator().manual_seed(seed)

    def features(count: int) -> Tensor:
        return (torch.ones if alike else torch.randn)(count, dimensions, **({} if alike else {"generator": generator}))

    prompts, count = [f"caption {i}" for i in range(captions)], captions * pictures
    solvers = [Key.of("ddim", n) for n in steps]
    keys = [TEACHER, Key(TEACHER + AGAIN), *solvers, *(Key.of(STUDENT, n) for n in steps)]
    sets = {key: features(count) for key in keys}
    shown = [prompts[i % captions] for i in range(count)]
    listed = [prompt for prompt in prompts for _ in range(real)]
    sets |= {Key(REAL): features(len(listed))} if real else {}
    gallery = listed or shown
    sets[Key("gallery")] = features(len(gallery))
    few = len(listed) < named(kind).pictures_needed(dimensions)
    facts = Reference(
        model="mini",
        base={"digest": "d", "unet": "u", "dtype": "float32"},
        settings={"teacher_steps": 50, "seed": 1000},
        seeds={"teacher": 1000, "compared": 1001},
        prompts=prompts,
        network_evaluations={TEACHER: 100} | {key: key.evaluations for key in solvers},
        scores={},
        features=FeatureSet(name="random", dimensions=dimensions, distance=kind),
        counts=Counts(pictures=count, real=len(listed), gallery=len(gallery)),
        distance_real_missing=f"{len(listed)} real test pictures are too few" if few else None,
        keys=Listed(real=[f"real {i}" for i in range(len(listed))], gallery=[f"{i}" for i in range(len(gallery))]),
        captions=Listed(real=listed, gallery=gallery),
    )
    return facts, sets


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list | tuple):
        return [each for item in (value.values() if isinstance(value, dict) else value) for each in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(
    ("steps", "real", "alike"), [((1, 2, 4), 5, False), ((1,), 1, False), ((1,), 0, False), ((1, 2, 4), 0, True)]
)
@pytest.mark.parametrize(("kind", "captions", "pictures", "dimensions"), COUNTS)
def test_few_captions_and_pictures_give_figures_a_verdict_and_a_card(
    kind: str, captions: int, pictures: int, dimensions: int, steps: tuple[int, ...], real: int, alike: bool
) -> None:
    sets = evaluation(kind, captions, pictures, dimensions, steps=steps, real=real, alike=alike)
    metrics = measure(*sets, resamples=50)
    assert all(map(math.isfinite, numbers(metrics.plain())))
    assert Metrics.parse(json.loads(json.dumps(metrics.plain())), "metrics") == metrics
    assert (metrics.prompts, metrics.pictures) == (captions, captions * pictures)
    assert (TEACHER in metrics.diversity) == (pictures > 1)
    if captions == 1 or alike:
        assert gate_failures(metrics, Gate(steps=1)) and gate_failures(metrics, Gate(steps=4))
    assert against(metrics, metrics, Gate(steps=1), "itself") == []
    if dimensions == 1:  # the card knows nothing of the dimensions
        assert not re.search(r"\b(nan|inf)\b", render(figures=metrics.plain()))


@pytest.mark.parametrize("kind", ["frechet", "cmmd"])
@pytest.mark.parametrize(("captions", "pictures"), [(2, 2), (3, 5), (8, 1)])
def test_a_lead_by_chance_seldom_passes_the_gate(kind: str, captions: int, pictures: int) -> None:
    undemanding = Gate(steps=1, min_retrieval=0, min_diversity=0)
    passed = {True: 0, False: 0}
    for seed in range(40):
        sets = evaluation(kind, captions, pictures, 1, steps=(1,), real=0, seed=seed)
        metrics = measure(*sets, resamples=100)
        for beyond_chance in passed:
            passed[beyond_chance] += not gate_failures(
                metrics, undemanding.model_copy(update={"beyond_chance": beyond_chance})
            )
    assert passed[True] <= 4 and passed[False] >= 12, passed


@pytest.mark.parametrize("alike", [False, True])
def test_one_step_alone_has_charts(alike: bool, tmp_path: Path) -> None:
    metrics = measure(*evaluation("frechet", 2, 2, 2, steps=(1,), real=0, alike=alike), resamples=0)
    charts.curves(plot_rows(metrics, 4.0), metrics.floor, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 0
