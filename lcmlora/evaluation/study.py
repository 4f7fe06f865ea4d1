"""Stages `alone` and `study`: is the acceleration universal? Styles and fine-tuned checkpoints with the adapter added.

theta' = theta + lambda1 tau_style + lambda2 tau_LCM (arXiv 2311.05556, eq. 3), without further training. A style's sets
are compared with its own pictures: the style alone under guided solvers (its Figure 3), the style accelerated, the
acceleration without the style. Everything starts from the same noise.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcmlora.adapters import combine, formats, lora
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data, Evaluation, Kind, Study, digest
from lcmlora.data.prepare import prepare_pictures
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation import figures
from lcmlora.evaluation.comparisons.measuring import variety
from lcmlora.evaluation.evaluate import read_reference, student_settings
from lcmlora.evaluation.figures import AGAIN, REAL, STUDENT, Key
from lcmlora.evaluation.image_sets import StudentSettings, save_thumbnails, thumbnails_path
from lcmlora.evaluation.measures.bootstrap import Bootstrap, interval
from lcmlora.evaluation.measures.distances import distance
from lcmlora.evaluation.measures.metrics import retrieval_at_1
from lcmlora.evaluation.reference import (
    Compared,
    about_real,
    check_count,
    choose_real,
    image_sets_of,
)
from lcmlora.evaluation.sets.captions import reporting, reporting_seeds
from lcmlora.evaluation.sets.drawing import adapter_layers, load_features
from lcmlora.io.files import atomic_folder, sha256_file, write_json

STUDY = "study.json"
ALONE, ACCELERATED, ADAPTER = "alone/", "accelerated", "adapter"
_FACTS = "alone.json"
_STYLE_SOLVER = "dpm++"  # the solver that the paper's Figure 3 draws styles with


@dataclass(frozen=True)
class Variation:
    """A style's LoRA or a fine-tuned checkpoint, and what was drawn with it alone."""

    kind: Kind
    name: str
    folder: Path  # what `train_variation` wrote
    alone: Path  # what `draw_alone` wrote


class Alone(Compared):
    """alone.json: a style's or a checkpoint's own pictures, drawn without the adapter."""

    kind: str  # style or finetune
    prompts: list[str]
    seed: int
    network_evaluations: dict[Key, int]


def _read_alone(folder: Path) -> Alone:
    path = folder / _FACTS
    if not path.exists():
        raise UserError(f"{path}: is missing; run `lcmlora alone` first")
    return Alone.read(path)


def draw_alone(
    base: LoadedBase,
    kind: Kind,
    folder: Path,
    data: Data,
    settings: Study,
    evaluation: Evaluation,
    scratch: Path,
    out: Path,
) -> Alone:
    """Draws a style or a fine-tuned checkpoint under guided solvers into the folder `out`; returns its facts.

    That is features.safetensors, alone.json and pictures/*.png, the features of its own real pictures among them.

    Args:
        base: the bare base of a style, or the checkpoint.
        folder: what `train_variation` wrote.
        data: the real pictures; those whose captions are for test are drawn and compared with.

    Raises:
        UserError: fewer pictures than the features need.
    """
    features = load_features(base, evaluation)
    check_count("study.pictures", settings.pictures, features)
    prepare_pictures(data, 1, scratch / "pictures")
    captions = reporting(scratch / "pictures", settings.pictures)
    prompts = captions.prompts[: settings.pictures]
    real, gallery = choose_real(captions.records, prompts, settings.pictures)
    compared = about_real(real, gallery, settings.pictures, features)
    if compared.distance_real_missing:
        raise UserError(
            f"{folder}: {compared.distance_real_missing}; give it more (study.real, data.test) or take it out of "
            "study in params.yaml"
        )
    image_sets = image_sets_of(base, features, evaluation, prompts, settings.pictures, scratch / "drawn")
    scale, steps = evaluation.guidance_scale, settings.steps // 2
    solvers = {Key.of(_STYLE_SOLVER, n): SolverSettings.of(_STYLE_SOLVER, n, scale) for n in settings.solver_steps}
    solvers |= {Key.of(solver, steps): SolverSettings.of(solver, steps, scale) for solver in evaluation.solver_names}
    with contextlib.ExitStack() as stack:
        if kind == "style":
            layers, identity = adapter_layers(folder)
            stack.enter_context(lora.applied(base.network, layers, str(folder)))
        else:
            identity = ""  # the checkpoint is the base
        seed = reporting_seeds(evaluation.seed).compared
        drawn = {
            Key(ALONE + key): image_sets.draw(f"{folder.name} {key}", each, seed, identity)
            for key, each in solvers.items()
        }
    tensors: dict[str, Tensor] = {key: image_set.features for key, image_set in drawn.items()}
    tensors |= {
        name: image_sets.real(label, chosen, data)["features"]
        for name, label, chosen in ((REAL, "real pictures", real), ("gallery", "gallery", gallery))
    }
    facts = Alone(
        kind=kind,
        prompts=prompts,
        seed=seed,
        network_evaluations={Key(ALONE + key): each.evaluations for key, each in solvers.items()},
        **compared.fields(),
    )
    with atomic_folder(out) as part:
        image_sets.keep(part, drawn, tensors, {}, data, captions.records)
        facts.write(part / _FACTS)
    shutil.rmtree(scratch)
    return facts


def run_study(
    load_base: Callable[[Path | None], LoadedBase],
    adapter: Path,
    variations: list[Variation],
    settings: Study,
    evaluation: Evaluation,
    reference: Path,
    scratch: Path,
    out: Path,
) -> figures.Study:
    """Adds the adapter to every variation, draws and compares; returns the figures.

    Writes study.json and the first pictures of every set to the folder `out`.

    Args:
        load_base: the base, or the fine-tuned checkpoint in a folder.
        adapter: the folder that `distill` wrote.
        reference: the folder that `draw_reference` wrote, for the sweep of guidance scales.
        scratch: folder in which a run that was killed left its batches.

    Raises:
        UserError: a set was drawn for other settings, or an adapter does not fit.
    """
    students = student_settings(adapter, settings.student_steps, "study.student_steps")
    base = load_base(None)
    _, identity = adapter_layers(adapter)
    with atomic_folder(out) as folder:
        guidance = _guidance(base, adapter, settings, evaluation, reference, scratch, folder)
        found, weights = {}, None
        styles = [variation for variation in variations if variation.kind == "style"]
        for variation in variations:
            loaded = base if variation.kind == "style" else load_base(variation.folder)
            accelerated = _AcceleratedVariation(loaded, adapter, variation, settings, evaluation, scratch)
            found[variation.name] = accelerated.compare(students, folder / "pictures" / variation.name)
        if styles and settings.grid_style_weights and settings.grid_adapter_weights:
            chosen = next((s for s in styles if s.name == settings.grid_style), styles[0])
            accelerated = _AcceleratedVariation(base, adapter, chosen, settings, evaluation, scratch)
            weights = accelerated.weights_grid(students[Key.of(STUDENT, settings.steps)], folder)
        result = figures.Study(adapter=identity, guidance=guidance, weights=weights, variations=found)
        result.write(folder / STUDY)
    shutil.rmtree(scratch)
    return result


class _AcceleratedVariation:
    """A variation with the adapter added, and how it is drawn and measured."""

    def __init__(
        self,
        base: LoadedBase,
        adapter: Path,
        variation: Variation,
        settings: Study,
        evaluation: Evaluation,
        scratch: Path,
    ) -> None:
        self._base, self._variation, self._settings = base, variation, settings
        self._facts = _read_alone(variation.alone)
        self._alone = load_file(variation.alone / "features.safetensors")
        self._features = load_features(base, evaluation)
        drawn_with, wanted = self._facts.features.name, self._features.name
        if drawn_with != wanted:
            raise UserError(
                f"{variation.alone}: was drawn with {drawn_with}, and this study has {wanted}; draw it again"
            )
        prompts, self._seed = self._facts.prompts, self._facts.seed
        self._image_sets = image_sets_of(base, self._features, evaluation, prompts, settings.pictures, scratch)
        self._grid_pictures, self._resamples = evaluation.pictures, evaluation.resamples
        self._lcm = formats.read(adapter / lora.WEIGHTS)
        self._style = formats.read(variation.folder / lora.WEIGHTS) if variation.kind == "style" else None
        paths = [adapter / lora.WEIGHTS] + ([variation.folder / lora.WEIGHTS] if self._style else [])
        self._identity = [sha256_file(path) for path in paths]

    @contextlib.contextmanager
    def _with(self, style: float, lcm: float) -> Iterator[str]:
        """Within the block style and adapter have these weights in the UNet; yields a digest of that."""
        parts = [(self._lcm, lcm)] + ([(self._style, style)] if self._style and style else [])
        layers = combine.combine_adapters(parts).layers
        factors = {name: (layer.down, layer.folded.up) for name, layer in layers.items()}
        with lora.applied(self._base.network, factors, self._variation.name):
            yield digest({"adapters": self._identity[: len(parts)], "weights": [weight for _, weight in parts]})

    def _weights(self) -> tuple[float, float]:
        return self._settings.weights if self._style else (0.0, 1.0)

    def compare(self, students: dict[Key, StudentSettings], folder: Path) -> figures.Variation:
        """Returns the figures of this variation and keeps its pictures in `folder`."""
        name, steps, seed = self._variation.name, self._settings.steps, self._seed
        chosen = {Key.of(ACCELERATED, key.steps): each for key, each in students.items()}
        with self._with(*self._weights()) as identity:
            drawn = {key: self._image_sets.draw(f"{name} {key}", each, seed, identity) for key, each in chosen.items()}
        if self._style:
            key, student = Key.of(ADAPTER, steps), students[Key.of(STUDENT, steps)]
            with self._with(0.0, 1.0) as identity:
                drawn[key] = self._image_sets.draw(f"{name} {key}", student, seed, identity)
            chosen[key] = student
        shutil.copytree(self._variation.alone / "pictures", folder)
        for key, image_set in drawn.items():
            save_thumbnails(image_set.thumbnails, folder / f"{key.replace('/', '-')}.png")
        write_json(folder / "prompts.json", {"prompts": self._image_sets.shown[: self._image_sets.rows]})
        sets = {Key(name): value for name, value in self._alone.items() if name.startswith(ALONE)}
        sets |= {key: image_set.features for key, image_set in drawn.items()}
        costs = self._facts.network_evaluations | {key: each.evaluations for key, each in chosen.items()}
        return self._figures(sets, costs)

    def _figures(self, sets: dict[Key, Tensor], costs: dict[Key, int]) -> figures.Variation:
        real, kind, shown = self._alone[REAL], self._features.distance, self._image_sets.shown
        distances = {key: distance(real, value, kind) for key, value in sets.items()}
        compared = {key: value for key, value in sets.items() if costs[key] == self._settings.steps}
        spread: dict[Key, Tensor] = {}
        if self._resamples:
            bootstrap = Bootstrap(shown, resamples=self._resamples, seed=self._seed, device=self._base.device)
            spread = bootstrap.distance(real, compared, kind, self._facts.captions.real)
        return figures.Variation(
            kind=self._variation.kind,
            pictures=self._image_sets.pictures,
            real_pictures=len(real),
            prompts=len(self._facts.prompts),
            seed=self._seed,
            weights=list(self._settings.weights) if self._style else [None, 1.0],
            distance_real=distances,
            intervals={key: interval(samples, distances[key]) for key, samples in spread.items()},
            retrieval={key: self._retrieval(value, shown) for key, value in sets.items()},
            network_evaluations=costs,
            claims=self._claims({key: distances[key] for key in compared}, spread),
        )

    def _retrieval(self, features: Tensor, shown: list[str]) -> float:
        return retrieval_at_1(features, shown, self._alone["gallery"], self._facts.captions.gallery)

    def _claims(self, distances: dict[Key, float], spread: dict[Key, Tensor]) -> list[figures.Claim]:
        """Returns what the paper says of such a combination and whether it holds here, at equal evaluations."""
        steps = self._settings.steps
        mine = Key.of(ACCELERATED, steps)
        solver = min((key for key in distances if key.startswith(ALONE)), key=distances.__getitem__)
        what = "style" if self._style else "checkpoint"
        others = {f"accelerated, the {what} is closer to its pictures than alone under its best solver": solver}
        if self._style:
            claim = "accelerated, the style is closer to its pictures than the acceleration without it"
            others[claim] = Key.of(ADAPTER, steps)
        claims = []
        for claim, other in others.items():
            difference = distances[mine] - distances[other]
            claims.append(
                figures.Claim(
                    claim=claim,
                    evaluations=steps,
                    accelerated=distances[mine],
                    other=distances[other],
                    other_key=other,
                    difference=difference,
                    interval=interval(spread[mine] - spread[other], difference) if spread else None,
                    holds=difference < 0,
                )
            )
        return claims

    def weights_grid(self, student: StudentSettings, folder: Path) -> figures.WeightsGrid:
        """Returns distance and retrieval for each pair of weights and draws the first prompt with each of them."""
        s, kind = self._settings, self._features.distance
        image_sets = replace(self._image_sets, pictures=self._grid_pictures, rows=1, scorers=())
        distances, retrieval, rows = [], [], []
        for style in s.grid_style_weights:
            drawn = []
            for lcm in s.grid_adapter_weights:
                with self._with(style, lcm) as identity:
                    label = f"{self._variation.name} {style:g} + {lcm:g} adapter"
                    drawn.append(image_sets.draw(label, student, self._seed, identity))
            distances.append([distance(self._alone[REAL], each.features, kind) for each in drawn])
            retrieval.append([self._retrieval(each.features, image_sets.shown) for each in drawn])
            rows.append(torch.cat([each.thumbnails[0] for each in drawn], dim=2))
        save_thumbnails(torch.cat(rows, dim=1)[None], folder / "pictures" / "weights.png")
        return figures.WeightsGrid(
            style=self._variation.name,
            steps=s.steps,
            pictures=self._grid_pictures,
            prompt=image_sets.prompts[0],
            style_weights=list(s.grid_style_weights),
            adapter_weights=list(s.grid_adapter_weights),
            distance_real=distances,
            retrieval=retrieval,
        )


def _guidance(
    base: LoadedBase,
    adapter: Path,
    settings: Study,
    evaluation: Evaluation,
    reference: Path,
    scratch: Path,
    folder: Path,
) -> figures.Guidance | None:
    """Returns what guidance on top of the adapter does, which was distilled with guidance already."""
    if not settings.guidance_scales:
        return None
    facts = read_reference(reference)
    sets = load_file(reference / "features.safetensors")
    features = load_features(base, evaluation)
    image_sets = image_sets_of(base, features, evaluation, facts.prompts, evaluation.pictures, scratch)
    plain = student_settings(adapter, (settings.steps,), "study.steps")[Key.of(STUDENT, settings.steps)]
    scales = [1.0, *settings.guidance_scales]
    students = [replace(plain, guidance_scale=scale) for scale in scales]
    layers, identity = adapter_layers(adapter)
    seed = reporting_seeds(evaluation.seed).compared
    with lora.applied(base.network, layers, str(adapter)):
        drawn = [image_sets.draw(f"guidance {each.guidance_scale:g}", each, seed, identity) for each in students]
    teacher, kind = sets[facts.teacher], features.distance
    floor = distance(teacher, sets[facts.teacher + AGAIN], kind)
    for student, image_set in zip(students, drawn, strict=True):
        save_thumbnails(image_set.thumbnails, thumbnails_path(folder, f"guidance@{student.guidance_scale:g}"))
    all_kinds = sets[REAL] if REAL in sets else sets["gallery"]
    return figures.Guidance(
        steps=settings.steps,
        scales=scales,
        network_evaluations=[each.evaluations for each in students],
        excess=[distance(teacher, image_set.features, kind) - floor for image_set in drawn],
        retrieval=[
            retrieval_at_1(each.features, image_sets.shown, sets["gallery"], facts.captions.gallery) for each in drawn
        ],
        diversity=[variety(each.features, image_sets.shown, all_kinds) for each in drawn],
    )
