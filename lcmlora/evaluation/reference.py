"""Stage `reference`: all that no adapter changes, drawn once. Teacher, solvers, real pictures, and their features.

The teacher's pictures start from noise of seed S. Everything that is compared with them starts from seed S + 1: the
solvers, the student, and the teacher itself once more, whose distance to the first set is the floor of that comparison.
Where the data are prompts without pictures, a third set of the teacher's (seed S + 2) is the gallery of retrieval.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from torch import Tensor

from lcmlora import stages
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.folders import Identity
from lcmlora.config import Data, Evaluation
from lcmlora.data.sources.source import Record
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation import timings
from lcmlora.evaluation.figures import AGAIN, REAL, TEACHER, FeatureSet, Key, Search
from lcmlora.evaluation.image_sets import FEATURES, Drawers, ImageSet, ImageSets
from lcmlora.evaluation.measures import distances
from lcmlora.evaluation.measures.features import Features
from lcmlora.evaluation.measures.scores import Scorer
from lcmlora.evaluation.sets.captions import GALLERY, choosing, distinct_captions, reporting, reporting_seeds
from lcmlora.evaluation.sets.drawing import load_check, load_features, load_scorers, pictures_needed
from lcmlora.evaluation.sets.own_prompts import OWN_PROMPTS, read_own_prompts
from lcmlora.evaluation.sets.solver_search import choose_baselines
from lcmlora.io.documents import Document, Number
from lcmlora.io.files import atomic_folder, sha256_file, sha256_folder
from lcmlora.plugins import SOURCES

REFERENCE = "reference.json"


class Counts(Document):
    """How many pictures there are of each kind."""

    pictures: int  # of each drawn set
    real: int
    gallery: int


class Listed(Document):
    """What is listed of the real pictures and of the gallery of retrieval, in the order of their features."""

    real: list[str]
    gallery: list[str]


class Compared(Document):
    """What drawn sets are compared with, and by which features."""

    features: FeatureSet
    counts: Counts
    distance_real_missing: str | None
    keys: Listed
    captions: Listed


class Reference(Compared):
    """reference.json: what was drawn without an adapter, and how."""

    model: str
    base: Identity  # digest and unet; and dtype
    settings: dict[str, Any]  # evaluation in params.yaml
    seeds: dict[str, int]
    prompts: list[str]
    network_evaluations: dict[Key, int]
    scores: dict[str, dict[Key, Number]]
    baselines: dict[Key, SolverSettings] = Field(default_factory=dict)  # the settings that each solver was drawn with
    search: Search | None = None  # how they were chosen; None where all are fixed by hand
    check: FeatureSet | None = None  # the second features, by which every set is measured as well
    check_missing: str | None = None  # why there are none

    @property
    def teacher(self) -> Key:
        """The name of the teacher's set."""
        return Key.of(TEACHER, self.settings["teacher_steps"])


def draw_reference(
    base: LoadedBase,
    data: Data,
    settings: Evaluation,
    pictures: Path,
    scratch: Path,
    out: Path,
    timings_folder: Path,
    drawers: Drawers | None = None,
) -> Reference:
    """Writes features.safetensors, reference.json and pictures/*.png to the folder `out`; returns reference.json.

    Args:
        base: with all its parts and no adapter.
        pictures: the folder that `prepare` wrote.
        scratch: folder in which a run that was killed left its batches.
        timings_folder: where it is written how long this machine took.
        drawers: workers that draw with the same base; by default this process does.

    Raises:
        UserError: fewer pictures asked for than the features need, or no test captions.
    """
    features, check = load_features(base, settings), load_check(base, settings)
    check_count("evaluation.pictures", settings.pictures, features)
    validation, seeds = choosing(pictures, settings.choosing_pictures), reporting_seeds(settings.seed)
    # Without validation captions the solvers' settings are searched on these, too.
    most = settings.pictures if validation.prompts else max(settings.pictures, settings.choosing_pictures)
    captions = reporting(pictures, most)
    prompts = captions.prompts[: settings.pictures]
    scorers = load_scorers(base, settings)
    image_sets = image_sets_of(base, features, settings, prompts, settings.pictures, scratch, scorers, check, drawers)

    baselines, search = choose_baselines(image_sets, settings, validation, captions)
    jobs = _jobs(settings, baselines)
    drawn = {key: image_sets.draw(key, each, seed) for key, (each, seed) in jobs.items()}
    tensors, second = _vectors(drawn)
    if not SOURCES.get(data.source).has_pictures:
        teacher, _ = jobs[Key.of(TEACHER, settings.teacher_steps)]
        tensors["gallery"] = image_sets.draw("gallery", teacher, seeds.gallery).features
        compared = about_prompts(image_sets.shown, seeds.gallery, features)
    else:
        real, gallery = choose_real(captions.records, prompts, settings.pictures)
        seen = image_sets.real("real pictures", real, data)
        tensors[REAL], tensors["gallery"] = seen["features"], image_sets.real("gallery", gallery, data)["features"]
        second |= {REAL: seen["check"]} if check else {}
        compared = about_real(real, gallery, settings.pictures, features)
    facts = Reference(
        model=base.name,
        base={
            "digest": base.examination.digest,
            "unet": base.examination.unet_digest,
            "dtype": str(base.dtype).removeprefix("torch."),
        },
        settings=settings.model_dump(mode="json"),
        seeds={"teacher": seeds.teacher, "compared": seeds.compared},
        prompts=prompts,
        network_evaluations={key: each.evaluations for key, (each, _) in jobs.items()},
        scores=mean_scores(drawn),
        **({"check": feature_set(check)} if check else {"check_missing": _check_missing(settings)}),
        baselines=baselines,
        search=search,
        **compared.fields(),
    )
    own = _draw_own_prompts(image_sets, settings, jobs, facts)
    with atomic_folder(out) as folder:
        image_sets.keep(folder, drawn, tensors, second, data, captions.records)
        facts.write(folder / REFERENCE)
        if own:
            own.keep(folder / OWN_PROMPTS, data)
    _write_timings(drawn, out, timings_folder)
    shutil.rmtree(scratch)
    return facts


def _write_timings(drawn: dict[Key, ImageSet], reference: Path, folder: Path) -> None:
    """Writes how long this machine took for a picture of each set."""
    seconds = {key: image_set.seconds for key, image_set in drawn.items() if not key.endswith(AGAIN)}
    timings.Timings(
        reference_digest=sha256_file(reference / FEATURES),
        adapter=None,
        measured=timings.Measured(seconds_per_picture=seconds),
    ).write(folder / timings.REFERENCE)


Jobs = dict[Key, tuple[SolverSettings, int]]  # the sampler settings of every set, and its seed


class _OwnPrompts(NamedTuple):
    """What was drawn for `evaluation.prompts`: a reference of its own, without real pictures."""

    image_sets: ImageSets
    drawn: dict[Key, ImageSet]
    gallery: Tensor
    facts: Reference

    def keep(self, folder: Path, data: Data) -> None:
        """Writes it to a folder, as `draw_reference` does."""
        folder.mkdir()
        features, check = _vectors(self.drawn)
        self.image_sets.keep(folder, self.drawn, features | {"gallery": self.gallery}, check, data, [])
        self.facts.write(folder / REFERENCE)


def _draw_own_prompts(image_sets: ImageSets, settings: Evaluation, jobs: Jobs, facts: Reference) -> _OwnPrompts | None:
    """Draws for the prompts of `evaluation.prompts` what is drawn for the test captions; None where there are none."""
    if settings.prompts is None:
        return None
    own = replace(image_sets, prompts=read_own_prompts(settings.prompts)[: settings.pictures])
    drawn = {key: own.draw(f"own prompts, {key}", each, seed) for key, (each, seed) in jobs.items()}
    seed = reporting_seeds(settings.seed).gallery
    gallery = own.draw("own prompts, gallery", jobs[facts.teacher][0], seed).features
    compared = about_prompts(own.shown, seed, own.features)
    about = {"prompts": list(own.prompts), "scores": mean_scores(drawn), **compared.fields()}
    return _OwnPrompts(own, drawn, gallery, facts.model_copy(update=about))


def _vectors(drawn: dict[Key, ImageSet]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the vectors of every set by the first features, and by the second ones where there are any."""
    check = {str(key): image_set.check for key, image_set in drawn.items() if image_set.check is not None}
    return {str(key): image_set.features for key, image_set in drawn.items()}, check


def _check_missing(settings: Evaluation) -> str:
    """Returns why there are no second features."""
    if settings.check_features is None:
        return "evaluation.check_features is null"
    return f"{settings.pictures} pictures are too few for the distance of {settings.check_features}"


def check_count(key: str, count: int, features: Features) -> None:
    """Raises UserError where so few pictures, asked for under this key, have no distance."""
    needed = pictures_needed(features)
    if count < needed:
        raise UserError(
            f"{key}: {count} are too few: the distance of {features.name} needs more pictures than its "
            f"{features.dimensions} dimensions; set at least {needed}"
        )


def image_sets_of(
    base: LoadedBase,
    features: Features,
    settings: Evaluation,
    prompts: Sequence[str],
    pictures: int,
    scratch: Path,
    scorers: Sequence[Scorer] = (),
    check: Features | None = None,
    drawers: Drawers | None = None,
) -> ImageSets:
    """Returns what draws with this base. Its identity is its folder, its precision and the version of `reference`."""
    parts = sorted(part.name for part in base.folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    identity = {part: sha256_folder(base.folder / part) for part in parts}
    scratch.mkdir(parents=True, exist_ok=True)
    return ImageSets(
        base,
        features,
        prompts,
        pictures,
        settings.batch,
        min(settings.grid_rows, pictures),
        scratch,
        # Only what draws: the version of another stage must not cost a killed run what it has drawn.
        f"{identity} {base.dtype} reference {stages.VERSIONS['reference']}",
        scorers,
        check,
        drawers,
    )


def mean_scores(drawn: dict[Key, ImageSet]) -> dict[str, dict[Key, float]]:
    """Returns the mean score of each set, by scorer."""
    means: dict[str, dict[Key, float]] = defaultdict(dict)
    for key, image_set in drawn.items():
        for name, values in image_set.scores.items():
            means[name][key] = values.double().mean().item()
    return dict(means)


def _jobs(settings: Evaluation, baselines: dict[Key, SolverSettings]) -> Jobs:
    seeds = reporting_seeds(settings.seed)
    teacher = SolverSettings.of("ddim", settings.teacher_steps, settings.guidance_scale)
    name = Key.of(TEACHER, settings.teacher_steps)
    solvers = {key: (baseline, seeds.compared) for key, baseline in baselines.items()}
    return {name: (teacher, seeds.teacher), Key(name + AGAIN): (teacher, seeds.compared)} | solvers


def feature_set(features: Features) -> FeatureSet:
    """Returns the features as the figures name them."""
    return FeatureSet(name=features.name, dimensions=features.dimensions, distance=features.distance)


def about_real(real: list[Record], gallery: list[Record], pictures: int, features: Features) -> Compared:
    """Returns what a reference's facts say of its real pictures."""
    missing = None
    if len(real) < distances.named(features.distance).pictures_needed(features.dimensions):
        missing = f"{len(real)} real test pictures are too few for {features.dimensions} dimensions"
    return Compared(
        features=feature_set(features),
        counts=Counts(pictures=pictures, real=len(real), gallery=len(gallery)),
        distance_real_missing=missing,
        keys=Listed(real=[r.key for r in real], gallery=[r.key for r in gallery]),
        captions=Listed(real=[r.caption for r in real], gallery=[r.caption for r in gallery]),
    )


def about_prompts(shown: list[str], seed: int, features: Features) -> Compared:
    """Returns what a reference's facts say where there are no real pictures.

    Args:
        shown: the prompts of the gallery that the teacher drew from this seed.
    """
    return Compared(
        features=feature_set(features),
        counts=Counts(pictures=len(shown), real=0, gallery=len(shown)),
        distance_real_missing="the data are prompts, without real pictures",
        keys=Listed(real=[], gallery=[f"{seed}/{i}" for i in range(len(shown))]),
        captions=Listed(real=[], gallery=shown),
    )


def choose_real(records: list[Record], prompts: Sequence[str], count: int) -> tuple[list[Record], list[Record]]:
    """Returns at most `count` real pictures, spread evenly over the captions, and the gallery of retrieval.

    The gallery holds up to four pictures of every prompt, not among the real ones where the caption has others.
    """
    by_caption: dict[str, list[Record]] = defaultdict(list)
    # By hash, or the first pictures of every caption would all be of the style that comes first in the list.
    for record in sorted(records, key=lambda r: r.sha256):
        by_caption[record.caption].append(record)
    captions = distinct_captions(records)
    rounds = range(max(len(group) for group in by_caption.values()))
    real = [by_caption[c][n] for n in rounds for c in captions if n < len(by_caption[c])][:count]
    taken = {record.key for record in real}
    gallery = []
    for caption in prompts:
        others = [record for record in by_caption[caption] if record.key not in taken]
        gallery += (others or by_caption[caption])[:GALLERY]
    return real, gallery
