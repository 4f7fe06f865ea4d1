"""Packaging the release bundle of one adapter: written for all programs, checked in plain diffusers, and sealed."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcmlora.adapters.metadata import FACTS, SCHEDULER, WEIGHTS, Distilled, Sampler, read_sampler
from lcmlora.config import Base, Config, Gate
from lcmlora.errors import UserError
from lcmlora.evaluation import timings
from lcmlora.evaluation.comparisons.compatibility import Compatibility, read_of
from lcmlora.evaluation.figures import STUDENT, Key, Metrics, Study
from lcmlora.evaluation.gate import by_steps, gate_failures
from lcmlora.evaluation.study import STUDY
from lcmlora.io.files import atomic_folder, sha256_file, write_json
from lcmlora.io.parsing import read_yaml
from lcmlora.io.terminal import note
from lcmlora.project import Project
from lcmlora.releases import comfyui
from lcmlora.releases.bundle import (
    CHECKSUMS,
    COMPATIBILITY,
    METRICS,
    PROVENANCE,
    REPORT,
    SAMPLE,
    WORKFLOW,
    Decision,
    Kohya,
    Provenance,
    StageSettings,
    digest,
)
from lcmlora.releases.checks.reload import ReloadCheck
from lcmlora.releases.checks.sampler import check_sampler, timesteps_by_steps
from lcmlora.releases.clients import Student, recommended_steps
from lcmlora.releases.pages.album import Album
from lcmlora.releases.pages.card import render_card
from lcmlora.releases.pages.report import render_report
from lcmlora.releases.ran import StagesRan


def package_release(model: str, config: Config, project: Project, base_folder: Path) -> Provenance:
    """Makes the release bundle of a model and returns its provenance. The folder appears whole or not at all.

    The bundle has latencies only if this machine measured them for this adapter (`Project.timings`).

    Args:
        base_folder: the base that the adapter was distilled with.

    Raises:
        UserError: an input is missing, or plain diffusers, given either of the two files with the weights, does not
            draw as the trained student did.
    """
    base, adapter = config.base(model), project.adapter(model)
    distilled = Distilled.read(adapter / FACTS)
    sampler = read_sampler(distilled.sampler.plain(), f"{adapter / FACTS}: sampler")
    figures = _figures(model, project)
    steps = [key.steps for key in figures.students]
    compatibility = read_of(project.compatibility(model), adapter / WEIGHTS)
    decision, enough = _decided(figures, config.gate, compatibility)
    ran = StagesRan.of(model, config, project)
    with atomic_folder(project.release(model)) as folder:
        _copy_inputs(model, project, folder)
        header = _header(model, base, project, figures, sampler, enough)
        kohya = _write_weights(folder, model, project, base, base_folder, distilled.distill.alpha, header)
        # Before the reload check, whose pipeline stays in memory.
        sampler_check = check_sampler(folder, adapter / WEIGHTS, base, base_folder, sampler, steps)
        precision = config.distill_for(model).precision
        check = ReloadCheck(folder, base, base_folder, adapter / "probe.safetensors", precision)
        provenance = Provenance(
            model=model,
            packaged=_now(),
            sha256=digest(folder),
            adapter=sha256_file(adapter / WEIGHTS),
            base=distilled.base | {"variant": base.variant},
            resolution=base.resolution,
            sampler=distilled.sampler,
            sampler_check=sampler_check,
            data_digest=distilled.data_digest,
            data_dvc=_dvc_digest(project, project.pictures_of(model, config)),
            seed=distilled.seed,
            params=_stage_settings(model, config, distilled, ran),
            versions=ran.versions | distilled.versions,
            git=ran.git,
            dvc_lock=sha256_file(project.dvc_lock) if project.dvc_lock.is_file() else None,
            gate=decision,
            recommended_steps=enough,
            reloaded=check.run(folder / WEIGHTS),
            kohya=Kohya(file=kohya.name, sha256=sha256_file(kohya), reloaded=check.run(kohya)),
        )
        provenance = provenance.model_copy(update=_where_known(model, config, project, ran))
        figures.write(folder / METRICS)
        if compatibility:
            compatibility.write(folder / COMPATIBILITY)
        provenance.write(folder / PROVENANCE)
        student = Student.of_release(folder, sampler, enough)
        _write_sample(folder, student, kohya.name, base, project.evaluation(model))
        _write_report(folder, model, figures, provenance, project, base, student, compatibility)
        page = render_card(model, base, distilled, figures, decision, kohya.name, student, sampler_check, compatibility)
        (folder / "README.md").write_text(page, encoding="utf-8")
        _write_checksums(folder)
    return provenance


def _decided(figures: Metrics, gate: Gate, compatibility: Compatibility | None) -> tuple[Decision, int]:
    """Returns the gate's decision, of all numbers of steps, and the recommended number."""
    failures, each = gate_failures(figures, gate, compatibility), by_steps(figures, gate, compatibility)
    shown = {str(number): reasons for number, reasons in each.items()}
    return Decision(passed=not failures, failures=failures, by_steps=shown), recommended_steps(figures, each)


def _where_known(model: str, config: Config, project: Project, ran: StagesRan) -> dict[str, Any]:
    """Returns the fields of the provenance that only some releases have."""
    found: dict[str, Any] = {"stages": ran.stages, "packaged_with": ran.packaging} if ran.stages else {}
    if config.has_own_data(model):
        found["pictures"] = project.own_pictures(model).relative_to(project.root).as_posix()
    return found


def _figures(model: str, project: Project) -> Metrics:
    """Returns the figures of the evaluation, of this machine's latencies, and of the study, as far as there are any."""
    evaluated = Metrics.read(project.metrics(model))
    latencies = _timings_of(model, evaluated, project.timings(model))
    return evaluated.joined(latencies, *_study_of(project.adapter(model), project.study(model)))


def _copy_inputs(model: str, project: Project, folder: Path) -> None:
    """Copies scheduler and contact sheet. Raises UserError where a stage has not written them or the weights."""
    adapter, evaluation = project.adapter(model), project.evaluation(model)
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter / WEIGHTS}: no such file; run the stages before package@{model} first")
    for source in (adapter / SCHEDULER, evaluation / "grid.png"):
        if not source.is_file():
            raise UserError(f"{source}: no such file; run the stages before package@{model} first")
        shutil.copyfile(source, folder / source.name)


def _write_report(
    folder: Path,
    model: str,
    figures: Metrics,
    provenance: Provenance,
    project: Project,
    base: Base,
    student: Student,
    compatibility: Compatibility | None,
) -> None:
    studied = figures.variations or figures.guidance or figures.weights
    pictures = [project.evaluation(model), *([project.study(model)] if studied else [])]
    page = render_report(
        model,
        figures,
        provenance,
        pictures,
        base=base,
        kohya_file=kohya_name(model),
        student=student,
        compatibility=compatibility,
    )
    (folder / REPORT).write_text(page, encoding="utf-8")


def _write_sample(folder: Path, student: Student, weights: str, base: Base, evaluation: Path) -> None:
    """Writes ComfyUI's workflow for the adapter, and a picture of the student's that opens in ComfyUI as this workflow.

    The picture is the evaluation's, drawn by our sampler: the workflow draws the same caption, from other noise.
    """
    album = Album([evaluation], count=1)
    made = comfyui.workflow(
        student,
        weights=weights,
        checkpoint=comfyui.checkpoint_name(base.source),
        prompt=album.prompts[0],
        side=base.resolution,
    )
    write_json(folder / WORKFLOW, comfyui.file_content(made))
    picture = album.first(Key.of(STUDENT, student.steps))
    picture.save(folder / SAMPLE, pnginfo=comfyui.png_chunks(made))


def _stage_settings(model: str, config: Config, distilled: Distilled, ran: StagesRan) -> StageSettings:
    """Returns the settings that each stage ran with; those of now where it is not known."""
    settings = {
        "data": config.data_for(model),
        "encode": config.encode_for(model),
        "evaluation": config.evaluation_for(model),
    }
    plain = {stage: each.model_dump(mode="json") for stage, each in settings.items()}
    made = {"gate": config.gate.deciding(), "distill": distilled.distill}
    return StageSettings.model_validate(plain | ran.sections | made)


def kohya_name(model: str) -> str:
    """Returns the second name of the bundle's weights, for ComfyUI and A1111, which show it to their users."""
    return f"lcm-lora-{model}.safetensors"


def _timings_of(model: str, figures: Metrics, folder: Path) -> timings.Measured:
    """Returns the latencies that this machine has measured for this adapter; empty where it has not."""
    file = folder / timings.EVALUATION
    measured = timings.read(file, reference_digest=figures.reference_digest, adapter=figures.adapter)
    if not measured.seconds_per_picture:
        note(
            f"{folder}: has no latencies of this adapter, which was evaluated on another machine; the release has "
            f"none (`dvc repro --force --single-item evaluate@{model}` measures them here)"
        )
    return measured


def _study_of(adapter: Path, studied: Path) -> list[Study]:
    """Returns the study of this adapter; none where there is none, or only one of another adapter."""
    if not (studied / STUDY).is_file():
        return []
    study = Study.read(studied / STUDY)
    return [study] if study.adapter == sha256_file(adapter / WEIGHTS) else []


def _header(
    model: str, base: Base, project: Project, figures: Metrics, sampler: Sampler, enough: int
) -> dict[str, str]:
    """Returns what the header of the weights says to people, by the model spec, and how to draw, for programs.

    It has no time, so that the same adapter and evaluation give the same bytes.

    Args:
        enough: the recommended number of steps.
    """
    steps = [key.steps for key in figures.students]
    name = sampler.scheduler.removesuffix("Scheduler")
    gamma = f", gamma {sampler.gamma:g}" if sampler.gamma is not None else ""
    drawing = {
        "scheduler": sampler.scheduler,
        "gamma": sampler.gamma,
        "guidance_scale": 1,
        "timesteps": timesteps_by_steps(project.adapter(model) / SCHEDULER, sampler, steps),
    }
    thumbnail = Album([project.evaluation(model)], 1).thumbnails(Key.of(STUDENT, enough), "")[0]
    header = {
        "title": f"lcm-lora-{model}",
        "description": f"Acceleration LoRA for {base.source}: pictures in {', '.join(map(str, steps))} steps, without "
        "classifier-free guidance.",
        "license": base.license,
        "usage_hint": f"{name}{gamma}, {enough} step{'s' * (enough > 1)}, CFG 1",
        "tags": "lora, lcm, acceleration",
        "thumbnail": thumbnail.source,
    }
    if base.author:
        header["author"] = base.author
    described = {f"modelspec.{key}": text for key, text in header.items()}
    return described | {"lcmlora.sampler": json.dumps(drawing, sort_keys=True)}


def _write_weights(
    folder: Path,
    model: str,
    project: Project,
    base: Base,
    base_folder: Path,
    alpha: float | None,
    header: dict[str, str],
) -> Path:
    """Writes the weights under both names and returns the second, for ComfyUI and A1111.

    Both have kohya's spelling, the only one that diffusers, ComfyUI, Forge, A1111 and InvokeAI read whole. Of a file in
    diffusers' spelling ComfyUI drops all attention layers with no more than a warning, and people take the file whose
    name they know from other releases.

    Raises:
        UserError: the trained weights are not finite or do not fit this base, or their effect would not be exactly
            that of the trained ones.
    """
    from lcmlora.adapters import formats
    from lcmlora.bases import architecture

    trained, out = project.adapter(model) / WEIGHTS, folder / kohya_name(model)
    structure = replace(architecture.of_folder(base_folder), resolution=base.resolution)
    error = formats.write(formats.read(trained, structure), out, formats.KOHYA, structure, header=header, alpha=alpha)
    if error:
        raise UserError(f"{out}: its effect is {error:.1e} away from that of {trained}, expected none; not released")
    shutil.copyfile(out, folder / WEIGHTS)
    return out


def _write_checksums(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    sums = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)
    (folder / CHECKSUMS).write_text(sums, encoding="utf-8")


def _dvc_digest(project: Project, pictures: Path) -> str | None:
    """Returns the prepared pictures' digest in dvc.lock, None where there is none."""
    out = pictures.relative_to(project.root).as_posix()
    try:
        stages = read_yaml(project.dvc_lock)["stages"].values()
        entries = (entry for stage in stages for entry in stage.get("outs", ()) if entry.get("path") == out)
        return next((entry.get("md5") for entry in entries), None)
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _now() -> str:
    """Returns the present time, or that of SOURCE_DATE_EPOCH, which reproducible builds set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is not None and not re.fullmatch(r"\d{1,11}", epoch):
        raise UserError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {epoch!r}")
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
