"""Stage `evaluate`: the student's pictures against the reference. Figures, a table for plots, a grid and a curve."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmlora import sampling
from lcmlora.bases import LoadedBase
from lcmlora.config import Data, Evaluation
from lcmlora.data.sources import read_records
from lcmlora.errors import UserError
from lcmlora.evaluation import features as feature_sets
from lcmlora.evaluation import report
from lcmlora.evaluation.features import Features
from lcmlora.evaluation.metrics import frechet_distance, retrieval_at_1
from lcmlora.evaluation.reference import AGAIN, Artist, distinct_captions, read_strip, square_picture, strip_path
from lcmlora.files import atomic_folder, atomic_write, sha256_file, write_json

_GRID_STEPS = 4  # at which the grid shows the solvers: where the adapter is meant to be used


def evaluate(
    base: LoadedBase,
    adapter: Path,
    data: Data,
    settings: Evaluation,
    pictures: Path,
    reference: Path,
    out: Path,
    metrics_file: Path,
    plots_file: Path,
    *,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Draws with the student, compares, and returns the metrics, which it also writes to `metrics_file`.

    Besides: `plots_file` (CSV, a row for each method and step count) and the folder `out` with grid.png, steps.png and
    features.safetensors.

    Args:
        base: with the adapter active in its UNet.
        adapter: the folder that `distill` wrote.
        reference: the folder that `draw_reference` wrote.
        scratch: an empty folder, or one in which a killed run of these very inputs left its batches.

    Raises:
        UserError: the reference was made for another base, with other features, prompts or settings, or the student is
            asked for more steps than it was distilled on.
    """
    features = feature_sets.load(settings.features, base.device)
    facts = _read_json(reference / "reference.json", "reference")
    records = read_records(pictures / "validation.jsonl")
    prompts = distinct_captions(records)[: settings.pictures]
    _check_reference(reference, facts, features, settings, prompts, adapter)
    sampler = _read_json(adapter / "config.json", "distill")["sampler"]
    grid = sampler["grid"]
    longest = max(settings.student_steps)
    if longest > grid:
        raise UserError(f"evaluation.student_steps: {longest} is more than the {grid} timesteps of the adapter's grid")

    artist = Artist(base, features, settings, prompts)
    drawn = {
        f"student@{n}": artist.draw(
            f"student@{n}", sampling.STUDENT, n, settings.seed + 1, scratch, grid=grid, gamma=sampler["gamma"]
        )
        for n in settings.student_steps
    }
    student = {key: drawing.features for key, drawing in drawn.items()}
    metrics = measure(facts, load_file(reference / "features.safetensors") | student)
    metrics["reference_digest"] = sha256_file(reference / "features.safetensors")
    metrics["seconds_per_picture"] |= {key: drawing.seconds for key, drawing in drawn.items()}
    metrics["network_evaluations"] |= {
        f"student@{n}": sampling.network_evaluations(sampling.STUDENT, n, 1.0) for n in settings.student_steps
    }
    table = _table(metrics, settings.teacher_steps)
    with atomic_folder(out) as folder:
        save_file(student, folder / "features.safetensors")
        first = {record.caption: record for record in reversed(records)}
        rows = [prompts[i % len(prompts)] for i in range(min(settings.grid_rows, settings.pictures))]
        real = [square_picture(data, first[caption], base.resolution) for caption in rows]
        columns = {"real": real} | _solver_columns(settings, reference)
        columns |= {key: [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in d.strip] for key, d in drawn.items()}
        report.grid(rows, columns, folder / "grid.png")
        report.curves(table, metrics["floor"], folder / "steps.png")
    atomic_write(plots_file, lambda path: _write_csv(path, table))
    write_json(metrics_file, metrics)
    return metrics


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; run `lcmlora {stage}` first") from None


def _check_reference(
    folder: Path, facts: dict[str, Any], features: Features, settings: Evaluation, prompts: list[str], adapter: Path
) -> None:
    made_for = _read_json(adapter / "config.json", "distill")["base"]["digest"]
    pairs = {
        "evaluation.features": (facts["features"]["name"], features.name),
        "the base's digest": (facts["base"]["digest"], made_for),
        "prompts": (facts["prompts"], prompts),
    }
    for name in ("seed", "pictures", "guidance_scale", "teacher_steps", "solvers", "solver_steps"):
        pairs[f"evaluation.{name}"] = (facts["settings"][name], settings.model_dump(mode="json")[name])
    for name, (there, here) in pairs.items():
        if there != here:
            shown = "other prompts" if name == "prompts" else f"{there} for {name}, and this evaluation has {here}"
            raise UserError(f"{folder}: was drawn with {shown}; draw it again (dvc repro reference@{facts['model']})")


def measure(facts: dict[str, Any], sets: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the figures of all sets of features (N, D), by the names that metrics/MODEL.json has.

    Args:
        facts: reference.json.
        sets: of the reference and of the student; `real` and `gallery` among them.
    """
    teacher = f"teacher@{facts['settings']['teacher_steps']}"
    compared = {key: value for key, value in sets.items() if key not in (teacher, teacher + AGAIN, "real", "gallery")}
    floor = frechet_distance(sets[teacher], sets[teacher + AGAIN])
    distances = {key: frechet_distance(sets[teacher], value) for key, value in compared.items()} | {"teacher": floor}

    captions, missing = facts["captions"], facts["frechet_real_missing"]
    shown = [facts["prompts"][i % len(facts["prompts"])] for i in range(facts["counts"]["pictures"])]
    retrieval = {
        key: retrieval_at_1(value, shown, sets["gallery"], captions["gallery"])
        for key, value in (compared | {teacher: sets[teacher]}).items()
    }
    in_gallery = set(facts["keys"]["gallery"])
    apart = [i for i, key in enumerate(facts["keys"]["real"]) if key not in in_gallery]
    if apart:  # a real picture that is in the gallery would find itself
        real_captions = [captions["real"][i] for i in apart]
        retrieval["real"] = retrieval_at_1(sets["real"][apart], real_captions, sets["gallery"], captions["gallery"])
    return {
        "features": facts["features"],
        "pictures": facts["counts"]["pictures"],
        "real_pictures": facts["counts"]["real"],
        "prompts": len(facts["prompts"]),
        "seed": facts["settings"]["seed"],
        "floor": floor,
        "frechet_teacher": distances,
        "excess": {key: value - floor for key, value in distances.items()},
        "frechet_real": None
        if missing
        else {key: frechet_distance(sets["real"], v) for key, v in (compared | {teacher: sets[teacher]}).items()},
        "frechet_real_missing": missing,
        "retrieval": retrieval,
        "seconds_per_picture": {k: v for k, v in facts["seconds_per_picture"].items() if not k.endswith(AGAIN)},
        "network_evaluations": {k: v for k, v in facts["network_evaluations"].items() if not k.endswith(AGAIN)},
    }


def _table(metrics: dict[str, Any], teacher_steps: int) -> list[report.Row]:
    """Returns a row for every method at every step count, in order."""
    rows = []
    for key, distance in metrics["frechet_teacher"].items():
        name = f"teacher@{teacher_steps}" if key == "teacher" else key
        method, steps = name.split("@")
        cost, retrieval = metrics["network_evaluations"][name], metrics["retrieval"][name]
        rows.append(report.Row(method, int(steps), cost, distance, metrics["excess"][key], retrieval))
    return sorted(rows, key=lambda row: (row.method, row.steps))


def _write_csv(path: Path, rows: list[report.Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(report.Row._fields)
        writer.writerows(rows)


def _solver_columns(settings: Evaluation, reference: Path) -> dict[str, list[Image.Image]]:
    """Returns the grid's pictures of teacher and solvers, from the noise that the student's row starts from too."""
    steps = min(settings.solver_steps, key=lambda n: abs(n - _GRID_STEPS))
    keys = [f"teacher@{settings.teacher_steps}{AGAIN}", *(f"{solver}@{steps}" for solver in settings.solvers)]
    return {key.removesuffix(AGAIN): read_strip(strip_path(reference, key)) for key in keys}
