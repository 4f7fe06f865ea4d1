"""The figures of image sets: distances, retrieval, diversity of seeds, and their intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from lcmlora.evaluation.comparisons.costs import compare_costs
from lcmlora.evaluation.figures import AGAIN, REAL, STUDENT, TEACHER, Intervals, Key, Metrics, SeedIntervals
from lcmlora.evaluation.measures.bootstrap import LEVEL, Bootstrap, interval
from lcmlora.evaluation.measures.distances import distance
from lcmlora.evaluation.measures.metrics import diversity, retrieval_hits
from lcmlora.evaluation.reference import Reference


def measure(facts: Reference, sets: dict[Key, Tensor], resamples: int, device: torch.device | None = None) -> Metrics:
    """Returns the figures of all sets of features (N, D).

    Args:
        sets: of the reference and of the student; `gallery` among them, and `real` where there are real pictures.
        resamples: of the bootstrap; without them there are no intervals.
        device: on which the bootstrap computes.
    """
    kind, teacher, real = facts.features.distance, facts.teacher, sets.get(Key(REAL))
    compared = _compared(facts, sets)
    with_teacher = compared | {teacher: sets[teacher]}
    floor = distance(sets[teacher], sets[Key(teacher + AGAIN)], kind)
    distances = {key: distance(sets[teacher], value, kind) for key, value in compared.items()} | {Key(TEACHER): floor}
    hits = _retrieval_hits(facts, sets)
    missing = facts.distance_real_missing
    costs = {key: value for key, value in facts.network_evaluations.items() if not key.endswith(AGAIN)}
    costs |= {key: key.steps for key in compared if key.method == STUDENT}
    metrics = Metrics(
        features=facts.features,
        pictures=facts.counts.pictures,
        real_pictures=facts.counts.real,
        prompts=len(facts.prompts),
        seed=facts.settings["seed"],
        floor=floor,
        distance_teacher=distances,
        excess={key: value - floor for key, value in distances.items()},
        distance_real=None
        if missing or real is None
        else {k: distance(real, v, kind) for k, v in with_teacher.items()},
        distance_real_missing=missing,
        retrieval={key: values.double().mean().item() for key, values in hits.items()},
        diversity=_diversities(facts, sets),
        scores=facts.scores,
        network_evaluations=costs,
        baselines={key: value for key, value in facts.baselines.items() if key in compared},
        solvers_chosen_on=facts.search.split if facts.search else None,
    )
    bootstrap = bootstrap_of(facts, resamples, device)
    if bootstrap is None:
        return metrics.model_copy(update=compare_costs(metrics, {}))
    return _with_intervals(metrics, facts, sets, hits, bootstrap)


def _compared(facts: Reference, sets: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Returns the sets that are compared with the teacher: the solvers' and the student's."""
    others = (facts.teacher, Key(facts.teacher + AGAIN), Key(REAL), Key("gallery"))
    return {key: value for key, value in sets.items() if key not in others}


def _shown(facts: Reference) -> list[str]:
    """Returns the caption of every picture of a drawn set, in order."""
    return [facts.prompts[i % len(facts.prompts)] for i in range(facts.counts.pictures)]


def _retrieval_hits(facts: Reference, sets: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Returns which pictures find their caption in the gallery, (N,) bool by set; those of the real pictures that are
    not in the gallery themselves, if there are any."""
    gallery, captions = sets[Key("gallery")], facts.captions
    drawn = _compared(facts, sets) | {facts.teacher: sets[facts.teacher]}
    hits = {key: retrieval_hits(value, _shown(facts), gallery, captions.gallery) for key, value in drawn.items()}
    in_gallery = set(facts.keys.gallery)
    apart = [i for i, key in enumerate(facts.keys.real) if key not in in_gallery]
    if apart:  # a real picture that is in the gallery would find itself
        real, real_captions = sets[Key(REAL)][apart], [captions.real[i] for i in apart]
        hits[Key(REAL)] = retrieval_hits(real, real_captions, gallery, captions.gallery)
    return hits


def _diversities(facts: Reference, sets: dict[Key, Tensor]) -> dict[Key, float]:
    """Returns the diversity of seeds of every set in which a caption has two pictures."""
    real = sets.get(Key(REAL))
    centre = sets[Key("gallery")] if real is None else real
    drawn = _compared(facts, sets) | {facts.teacher: sets[facts.teacher]}
    found = {key: variety(value, _shown(facts), centre) for key, value in drawn.items()}
    if real is not None:
        found[Key(REAL)] = variety(real, facts.captions.real, centre)
    return {key: value for key, value in found.items() if value is not None}


def _with_intervals(
    metrics: Metrics, facts: Reference, sets: dict[Key, Tensor], hits: dict[Key, Tensor], bootstrap: Bootstrap
) -> Metrics:
    """Returns the metrics with their intervals, and with the comparisons of costs, which have some of their own."""
    kind, teacher, compared = facts.features.distance, facts.teacher, _compared(facts, sets)
    excess, retrieval = metrics.excess, metrics.retrieval
    drawn_hits = {key: values for key, values in hits.items() if key != REAL}
    changes = bootstrap.expand_excess(sets[teacher], sets[Key(teacher + AGAIN)], compared, kind)
    spread = {key: bootstrap.samples(change) for key, change in changes.items()}
    to_real = {}
    if metrics.distance_real is not None:
        with_teacher = compared | {teacher: sets[teacher]}
        samples = bootstrap.distance(sets[Key(REAL)], with_teacher, kind, facts.captions.real)
        to_real = {key: interval(values, metrics.distance_real[key]) for key, values in samples.items()}
    intervals = Intervals(
        level=LEVEL,
        resamples=bootstrap.resamples,
        captions=bootstrap.captions,
        excess={key: interval(spread[key], excess[key]) for key in compared},
        retrieval={key: interval(bootstrap.mean(values), retrieval[key]) for key, values in drawn_hits.items()},
        distance_real=to_real,
        seeds=SeedIntervals(
            excess={key: interval(bootstrap.samples(changes[key], seeds=True), excess[key]) for key in compared},
            retrieval={
                key: interval(bootstrap.mean(values, seeds=True), retrieval[key]) for key, values in drawn_hits.items()
            },
        ),
    )
    return metrics.model_copy(update={"intervals": intervals, **compare_costs(metrics, spread)})


def bootstrap_of(facts: Reference, resamples: int, device: torch.device | None) -> Bootstrap | None:
    """Returns the resamples of the drawn pictures; None where the settings ask for none."""
    if not resamples:
        return None
    return Bootstrap(_shown(facts), resamples=resamples, seed=facts.settings["seed"], device=device)


def variety(features: Tensor, captions: list[str], all_kinds: Tensor) -> float | None:
    """Returns how far apart the pictures of one caption are, or None where each caption has but one.

    Args:
        all_kinds: features of pictures of all captions, best real ones, whose mean is what all pictures share.
    """
    return diversity(features, captions, all_kinds.double().mean(0)) if len(set(captions)) < len(captions) else None
