"""An adapter that was released on other data, measured again: on the reference that a new candidate was measured on."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from lcmlora.adapters import formats, lora
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import architecture
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.folders import Identity, check_same_base, identity
from lcmlora.config import Base, Evaluation
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons.measuring import measure
from lcmlora.evaluation.evaluate import read_reference
from lcmlora.evaluation.figures import AGAIN, REAL, STUDENT, Key, Metrics
from lcmlora.evaluation.image_sets import StudentSettings
from lcmlora.evaluation.reference import image_sets_of
from lcmlora.evaluation.sets.captions import reporting, reporting_seeds
from lcmlora.evaluation.sets.drawing import load_features
from lcmlora.io.files import sha256_file


def measure_again(
    base: LoadedBase,
    settings: Base,
    shown: str,
    weights: Path,
    made_for: Identity | None,
    sampler: Sampler,
    evaluation: Evaluation,
    steps: int,
    pictures: Path,
    reference: Path,
    scratch: Path,
) -> Metrics:
    """Returns the figures of an adapter at `steps`, as metrics/MODEL.json has them, but for solvers, scores, latency.

    Args:
        base: bare.
        shown: what messages call the adapter.
        weights: the file of an adapter of this very base.
        made_for: what is known of the base that it was made for.
        reference: the folder that `draw_reference` wrote for the new candidate.
        scratch: folder in which a run that was killed left its batches.

    Raises:
        UserError: the adapter is another base's, or the reference has other features.
    """
    check_same_base(shown, made_for, identity(settings, base.folder), "this base is")
    features = load_features(base, evaluation)
    facts = read_reference(reference)
    if facts.features.name != features.name:
        raise UserError(f"{reference}: has features {facts.features.name}, this evaluation {features.name}")
    prompts = reporting(pictures, evaluation.pictures).prompts
    image_sets = image_sets_of(base, features, evaluation, prompts, evaluation.pictures, scratch)
    read = formats.read(weights, architecture.of_base(settings, base.folder))
    layers = {name: (layer.down, layer.folded.up) for name, layer in read.layers.items()}
    key, digest = Key.of(STUDENT, steps), sha256_file(weights)
    with lora.applied(base.network, layers, shown):
        drawn = image_sets.draw(key, StudentSettings(steps, sampler), reporting_seeds(evaluation.seed).compared, digest)
    kept = load_file(reference / "features.safetensors")
    needed = (facts.teacher, Key(facts.teacher + AGAIN), Key(REAL), Key("gallery"))
    sets = {name: kept[name] for name in needed if name in kept}
    metrics = measure(facts, sets | {key: drawn.features}, evaluation.resamples, base.device)
    shutil.rmtree(scratch)
    of = {"reference_digest": sha256_file(reference / "features.safetensors"), "adapter": digest}
    return metrics.model_copy(update=of)
