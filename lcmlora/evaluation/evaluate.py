"""Stage `evaluate`: the student's pictures against the reference. Figures, a table for plots, contact sheet, curve."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.adapters.metadata import read_sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.folders import comparable_digests
from lcmlora.config import Data, Evaluation
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation import charts, timings
from lcmlora.evaluation.comparisons.check import measure_check
from lcmlora.evaluation.comparisons.measuring import bootstrap_of, measure
from lcmlora.evaluation.comparisons.worst import draw_worst, keep_worst, worst_captions
from lcmlora.evaluation.figures import (
    AGAIN,
    REAL,
    STUDENT,
    TEACHER,
    Key,
    Latency,
    Metrics,
    WorstCaptions,
)
from lcmlora.evaluation.image_sets import (
    CHECK,
    FEATURES,
    Drawers,
    ImageSet,
    ImageSets,
    StudentSettings,
    first_pictures,
    latency,
    read_thumbnails,
    save_thumbnails,
    thumbnails_path,
)
from lcmlora.evaluation.measures.features import Features
from lcmlora.evaluation.reference import (
    REFERENCE,
    Reference,
    image_sets_of,
    mean_scores,
)
from lcmlora.evaluation.sets.captions import reporting, reporting_seeds
from lcmlora.evaluation.sets.drawing import adapter_layers, load_check, load_features, load_scorers
from lcmlora.evaluation.sets.own_prompts import OWN_PICTURES, OWN_PROMPTS, read_own_prompts
from lcmlora.io import parsing
from lcmlora.io.files import atomic_folder, atomic_write, sha256_file, write_json
from lcmlora.io.parsing import as_object

# Settings of `evaluation` that decide what is in a reference.
_DRAWN = (
    *("seed", "pictures", "guidance_scale", "teacher_steps"),
    *("solvers", "solver_evaluations", "guidance_scales", "choosing_pictures"),
)


def evaluate_student(
    base: LoadedBase,
    adapter: Path,
    data: Data,
    settings: Evaluation,
    pictures: Path,
    reference: Path,
    scratch: Path,
    out: Path,
    metrics_file: Path,
    plots_file: Path,
    timings_folder: Path,
    gate_steps: int = 4,
    drawers: Drawers | None = None,
) -> Metrics:
    """Draws with the student, compares, and returns the metrics, which it also writes to `metrics_file`.

    Besides: `plots_file` (CSV, a row for each method and step count) and the folder `out` with grid.png, steps.png,
    features.safetensors and the first pictures of every method in pictures/. The same inputs give the same bytes of
    these; how long this machine took is written to `timings_folder` and is in none of them.

    Args:
        base: bare.
        adapter: the folder that `distill` wrote.
        reference: the folder that `draw_reference` wrote.
        scratch: folder in which a run that was killed left its batches.
        gate_steps: the student's steps at which its worst captions are shown (`gate.steps`).
        drawers: workers that draw with the same base and adapter; by default this process does. It always draws what
            is timed, and the worst captions.

    Raises:
        UserError: the reference was made for another base, with other features, prompts or settings, or the student is
            asked for more steps than it was distilled on.
    """
    features, check = load_features(base, settings), load_check(base, settings)
    facts = read_reference(reference)
    captions = reporting(pictures, settings.pictures)
    prompts = captions.prompts[: settings.pictures]
    _check_reference(reference, facts, features, check, settings, prompts, adapter)
    students = student_settings(adapter, settings.student_steps, "evaluation.student_steps")
    scorers = load_scorers(base, settings)
    image_sets = image_sets_of(base, features, settings, prompts, settings.pictures, scratch, scorers, check, drawers)
    own = own_reference(reference, settings)

    layers, identity = adapter_layers(adapter)
    seed = reporting_seeds(settings.seed).compared
    with lora.applied(base.network, layers, str(adapter)):
        drawn = _StudentSets.draw(facts, reference, image_sets, students, seed, identity)
        of_own = None
        if own:
            own_sets = replace(image_sets, prompts=own.prompts)
            of_own = _StudentSets.draw(
                own, reference / OWN_PROMPTS, own_sets, students, seed, identity, "own prompts, "
            )
        speed = latency(base, prompts, students, settings.latency_repeats)
    metrics = drawn.measured(settings).model_copy(update={"adapter": identity})
    if of_own:
        metrics = metrics.model_copy(update={"own_prompts": of_own.measured(settings)})
    student, count = Key.of(STUDENT, gate_steps), settings.worst_captions
    worst = worst_captions(metrics, drawn.features, image_sets.shown, facts.captions.gallery, student, count)
    metrics = metrics.model_copy(update={"worst": worst}) if worst else metrics
    others = latency(base, prompts, _timed(metrics, settings), settings.latency_repeats)
    speed = speed.model_copy(update={"seconds": speed.seconds | others.seconds})

    table = plot_rows(metrics, settings.guidance_scale)
    with atomic_folder(out) as folder:
        save_file({key: image_set.features for key, image_set in drawn.sets.items()}, folder / FEATURES)
        drawn.keep_pictures(folder)
        if of_own:
            of_own.keep_pictures(folder, OWN_PICTURES)
        if worst:
            at_worst = draw_worst(image_sets, worst, _beside_worst(metrics, settings, worst), seed)
            with lora.applied(base.network, layers, str(adapter)):
                at_worst |= draw_worst(image_sets, worst, {student: students[student]}, seed)
            if facts.counts.real:
                listed = [each.caption for each in worst.captions]
                at_worst[Key(REAL)] = first_pictures(data, captions.records, listed, base.resolution)
            keep_worst(worst, at_worst, folder)
        charts.contact_sheet(image_sets.shown[: image_sets.rows], _columns(metrics, folder), folder / "grid.png")
        charts.curves(table, metrics.floor, folder / "steps.png")
    atomic_write(plots_file, lambda path: _write_csv(path, table))
    metrics.write(metrics_file)
    drawn.write_timings(timings_folder, identity, speed)
    shutil.rmtree(scratch)
    return metrics


@dataclass(frozen=True)
class _StudentSets:
    """What the student drew for the prompts of a reference, to be compared with what is in that."""

    facts: Reference
    reference: Path  # the folder of `facts`
    image_sets: ImageSets  # which drew them
    sets: dict[Key, ImageSet]

    @classmethod
    def draw(
        cls,
        facts: Reference,
        reference: Path,
        image_sets: ImageSets,
        students: Mapping[Key, StudentSettings],
        seed: int,
        adapter: str,
        label: str = "",
    ) -> Self:
        """Draws with the adapter that is active in the network.

        Args:
            adapter: its digest.
            label: what the progress bar says before the key.
        """
        sets = {key: image_sets.draw(label + key, each, seed, adapter) for key, each in students.items()}
        return cls(facts, reference, image_sets, sets)

    @cached_property
    def features(self) -> dict[Key, Tensor]:
        """The features of the reference's sets and of the student's."""
        kept = {Key(name): value for name, value in load_file(self.reference / FEATURES).items()}
        return kept | {key: image_set.features for key, image_set in self.sets.items()}

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the reference's features."""
        return sha256_file(self.reference / FEATURES)

    def measured(self, settings: Evaluation) -> Metrics:
        """Returns the figures of the reference's sets and the student's: by both features, and the scores."""
        facts, device = self.facts, self.image_sets.base.device
        measured = {"reference_digest": self.digest, "scores": _scores(facts, mean_scores(self.sets))}
        metrics = measure(facts, self.features, settings.resamples, device).model_copy(update=measured)
        if facts.check:
            second = {Key(name): value for name, value in load_file(self.reference / CHECK).items()}
            second |= {key: image_set.check for key, image_set in self.sets.items() if image_set.check is not None}
            bootstrap = bootstrap_of(facts, settings.resamples, device)
            return metrics.model_copy(update={"check": measure_check(facts.check, second, metrics, bootstrap)})
        return metrics.model_copy(update={"check_missing": facts.check_missing}) if facts.check_missing else metrics

    def keep_pictures(self, folder: Path, group: str = "") -> None:
        """Writes the first pictures of the reference's sets and of the student's to pictures/ of the folder.

        Args:
            group: a folder within pictures/.
        """
        target, teacher = folder / "pictures" / group, self.facts.teacher
        shutil.copytree(self.reference / "pictures", target)
        # Of the teacher's two sets the one that starts from the same noise as all others is shown.
        thumbnails_path(folder, teacher + AGAIN, group).replace(thumbnails_path(folder, teacher, group))
        for key, image_set in self.sets.items():
            save_thumbnails(image_set.thumbnails, thumbnails_path(folder, key, group))
        rows = self.image_sets.shown[: self.image_sets.rows]
        write_json(target / "prompts.json", {"prompts": rows, "side": self.image_sets.base.resolution})

    def write_timings(self, folder: Path, adapter: str, speed: Latency) -> None:
        """Writes how long this machine took, with what it measured of the reference."""
        seconds = timings.read(folder / timings.REFERENCE, reference_digest=self.digest).seconds_per_picture
        seconds = seconds | {key: image_set.seconds for key, image_set in self.sets.items()}
        timings.Timings(
            reference_digest=self.digest,
            adapter=adapter,
            measured=timings.Measured(seconds_per_picture=seconds, latency=speed),
        ).write(folder / timings.EVALUATION)


def _beside_worst(metrics: Metrics, settings: Evaluation, worst: WorstCaptions) -> dict[Key, SolverSettings]:
    """Returns the settings of the sets beside the student's worst captions: the teacher's and the best solver's."""
    teacher = SolverSettings.of("ddim", settings.teacher_steps, settings.guidance_scale)
    return {metrics.teacher: teacher} | ({worst.rival: metrics.baselines[worst.rival]} if worst.rival else {})


def student_settings(adapter: Path, steps: tuple[int, ...], setting: str) -> dict[Key, StudentSettings]:
    """Returns the sampler settings of this folder's student for each number of steps.

    Raises:
        UserError: more steps than it was distilled on.
    """
    facts = adapter / "config.json"
    sampler = read_sampler(read_json(facts, "distill")["sampler"], f"{facts}: sampler")
    if max(steps) > sampler.grid:
        raise UserError(f"{setting}: {max(steps)} is more than the {sampler.grid} timesteps of the adapter's grid")
    return {Key.of(STUDENT, n): StudentSettings(n, sampler) for n in steps}


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """Returns what a stage wrote. Raises UserError where it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path}: is missing; run `lcmlora {stage}` first")
    return as_object(parsing.read_json(path), str(path))


def own_reference(reference: Path, settings: Evaluation) -> Reference | None:
    """Returns what was drawn for `evaluation.prompts`; None where there are none.

    Raises:
        UserError: the reference has none, or has other prompts.
    """
    if settings.prompts is None:
        return None
    folder, prompts = reference / OWN_PROMPTS, read_own_prompts(settings.prompts)[: settings.pictures]
    facts = read_reference(folder) if (folder / REFERENCE).exists() else None
    if facts is None or facts.prompts != prompts:
        has = "other own prompts" if facts else "no own prompts"
        raise UserError(f"{reference}: was drawn with {has} (evaluation.prompts); draw it again (`lcmlora reference`)")
    return facts


def read_reference(folder: Path) -> Reference:
    """Returns reference.json of the folder. Raises UserError where it is missing or damaged."""
    path = folder / REFERENCE
    if not path.exists():
        raise UserError(f"{path}: is missing; run `lcmlora reference` first")
    return Reference.read(path)


def _check_reference(
    folder: Path,
    facts: Reference,
    features: Features,
    check: Features | None,
    settings: Evaluation,
    prompts: list[str],
    adapter: Path,
) -> None:
    drawn_by, made_for = comparable_digests(facts.base, read_json(adapter / "config.json", "distill")["base"])
    pairs = {
        "evaluation.features": (facts.features.name, features.name),
        "evaluation.check_features": (facts.check.name if facts.check else None, check.name if check else None),
        "the base's digest": (drawn_by, made_for),
        "prompts": (facts.prompts, prompts),
    }
    for name in _DRAWN:
        pairs[f"evaluation.{name}"] = (facts.settings.get(name), settings.model_dump(mode="json")[name])
    for name, (there, here) in pairs.items():
        if there != here:
            shown = "other prompts" if name == "prompts" else f"{there} for {name}, and this evaluation has {here}"
            raise UserError(f"{folder}: was drawn with {shown}; draw it again (dvc repro reference@{facts.model})")


def _scores(facts: Reference, drawn: dict[str, dict[Key, float]]) -> dict[str, dict[Key, float]]:
    return facts.scores | {name: facts.scores.get(name, {}) | means for name, means in drawn.items()}


def _timed(metrics: Metrics, settings: Evaluation) -> dict[Key, SolverSettings]:
    """Returns the teacher, and the best solver at each number of evaluations that a student takes, to be timed.

    One solver stands for all: their own arithmetic is nothing beside the network's.
    """
    found = {metrics.teacher: SolverSettings.of("ddim", settings.teacher_steps, settings.guidance_scale)}
    for key in metrics.students:
        solvers = metrics.solvers_at(metrics.network_evaluations[key])
        if solvers:
            best = min(solvers, key=metrics.excess.__getitem__)
            found[best] = metrics.baselines[best]
    return found


def plot_rows(metrics: Metrics, guidance_scale: float) -> list[charts.Row]:
    """Returns a row for every method at every number of evaluations, in order.

    Args:
        guidance_scale: of the teacher.
    """
    rows = []
    for key, value in metrics.distance_teacher.items():
        name = metrics.teacher if key == TEACHER else key
        baseline = metrics.baselines.get(name)
        plain = guidance_scale if key == TEACHER else 1.0
        rows.append(
            charts.Row(
                method=name.method,
                network_evaluations=metrics.network_evaluations[name],
                steps=metrics.steps(name),
                guidance_scale=baseline.guidance_scale if baseline else plain,
                spacing=baseline.spacing if baseline else "",
                karras=baseline.karras if baseline else "",
                final=baseline.final if baseline else "",
                distance_teacher=value,
                excess=metrics.excess[key],
                retrieval=metrics.retrieval[name],
            )
        )
    return sorted(rows, key=lambda row: (row.method, row.network_evaluations))


def _write_csv(path: Path, rows: list[charts.Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(charts.Row._fields)
        writer.writerows(rows)


def _columns(metrics: Metrics, folder: Path) -> list[charts.Column]:
    """Returns the contact sheet's columns: real, teacher, then the best solver beside the student at equal cost."""
    teacher = metrics.teacher
    columns = [
        charts.Column(read_thumbnails(thumbnails_path(folder, teacher)), "teacher", metrics.count_label(teacher))
    ]
    if (real := thumbnails_path(folder, REAL)).exists():
        columns.insert(0, charts.Column(read_thumbnails(real), "real"))
    for rival, student in metrics.pairs:
        count = metrics.network_evaluations[student]
        group = f"{count} network evaluation{'' if count == 1 else 's'}"
        for key in filter(None, (rival, student)):
            details = metrics.baselines[key].text if key in metrics.baselines else metrics.count_label(key)
            pictures = read_thumbnails(thumbnails_path(folder, key))
            columns.append(charts.Column(pictures, key.name, details, group, key == student))
    return columns
