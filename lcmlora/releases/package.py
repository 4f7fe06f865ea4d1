"""Packaging the release bundle of one adapter: copied, reloaded in plain diffusers as a check, listed in SHA256SUMS."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lcmlora import __version__
from lcmlora.adapters.metadata import FACTS, SCHEDULER, WEIGHTS, Distilled, read_sampler
from lcmlora.config import Base, Config
from lcmlora.errors import UserError
from lcmlora.evaluation import timings
from lcmlora.evaluation.figures import STUDENT, Key, Metrics, Study
from lcmlora.evaluation.gate import gate_failures
from lcmlora.evaluation.study import STUDY
from lcmlora.io.files import atomic_folder, sha256_file, write_json
from lcmlora.io.parsing import read_yaml
from lcmlora.io.terminal import note
from lcmlora.project import Project
from lcmlora.releases import comfyui
from lcmlora.releases.bundle import (
    CHECKSUMS,
    METRICS,
    PROVENANCE,
    REPORT,
    SAMPLE,
    WORKFLOW,
    Commit,
    Decision,
    Kohya,
    Proof,
    Provenance,
    StageSettings,
    digest,
)
from lcmlora.releases.clients import Student, recommended_steps
from lcmlora.releases.pages.album import Album
from lcmlora.releases.pages.card import render_card
from lcmlora.releases.pages.report import render_report

# Largest allowed difference between reloaded and trained student, as a share of the student's largest output. In fp32
# both run the same kernels; a half-precision base may be reloaded on another device than it was trained on.
_TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-2}


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
    figures = _figures(model, project)
    failures = gate_failures(figures, config.gate)
    with atomic_folder(project.release(model)) as folder:
        _copy_inputs(model, project, folder)
        _check_adapter(folder / WEIGHTS, base_folder)
        precision = config.distill_for(model).precision
        check = ReloadCheck(folder, base, base_folder, adapter / "probe.safetensors", precision)
        reloaded = check.run(folder / WEIGHTS)
        kohya = _write_kohya(folder, model, base, base_folder, distilled.distill.alpha)
        provenance = Provenance(
            model=model,
            packaged=_now(),
            sha256=digest(folder),
            base=distilled.base | {"variant": base.variant},
            resolution=base.resolution,
            sampler=distilled.sampler,
            data_digest=distilled.data_digest,
            data_dvc=_dvc_digest(project, project.pictures_of(model, config)),
            seed=distilled.seed,
            params=_stage_settings(model, config, distilled),
            versions=distilled.versions | {"python": platform.python_version(), "lcmlora": __version__},
            git=_git(project.root),
            dvc_lock=sha256_file(project.dvc_lock) if project.dvc_lock.is_file() else None,
            gate=Decision(passed=not failures, failures=failures),
            reloaded=reloaded,
            kohya=Kohya(file=kohya.name, sha256=sha256_file(kohya), reloaded=check.run(kohya)),
        )
        if config.has_own_data(model):
            pictures = project.own_pictures(model).relative_to(project.root)
            provenance = provenance.model_copy(update={"pictures": pictures.as_posix()})
        figures.write(folder / METRICS)
        provenance.write(folder / PROVENANCE)
        sampler = read_sampler(distilled.sampler.plain(), f"{adapter / FACTS}: sampler")
        student = Student.of_release(folder, sampler, recommended_steps(figures))
        _write_sample(folder, student, kohya.name, base, project.evaluation(model))
        _write_report(folder, model, figures, provenance, project, base, student)
        page = render_card(model, base, distilled, figures, failures, kohya.name, student)
        (folder / "README.md").write_text(page, encoding="utf-8")
        _write_checksums(folder)
    return provenance


def _figures(model: str, project: Project) -> Metrics:
    """Returns the figures of the evaluation, of this machine's latencies, and of the study, as far as there are any."""
    evaluated = Metrics.read(project.metrics(model))
    latencies = _timings_of(model, evaluated, project.timings(model))
    return evaluated.joined(latencies, *_study_of(project.adapter(model), project.study(model)))


def _copy_inputs(model: str, project: Project, folder: Path) -> None:
    """Copies weights, scheduler and contact sheet. Raises UserError where a stage has not written them."""
    adapter, evaluation = project.adapter(model), project.evaluation(model)
    for source in (adapter / WEIGHTS, adapter / SCHEDULER, evaluation / "grid.png"):
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
) -> None:
    studied = figures.variations or figures.guidance or figures.weights
    pictures = [project.evaluation(model), *([project.study(model)] if studied else [])]
    page = render_report(
        model,
        figures,
        provenance,
        pictures,
        base_license=base.license,
        kohya_file=kohya_name(model),
        student=student,
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


def _stage_settings(model: str, config: Config, distilled: Distilled) -> StageSettings:
    settings = {
        "data": config.data_for(model),
        "encode": config.encode_for(model),
        "evaluation": config.evaluation_for(model),
        "gate": config.gate,
    }
    plain = {stage: each.model_dump(mode="json") for stage, each in settings.items()}
    return StageSettings.model_validate(plain | {"distill": distilled.distill})


def _check_adapter(weights: Path, base_folder: Path) -> None:
    """Raises UserError where the weights are not finite or do not fit this base."""
    from lcmlora.adapters import formats
    from lcmlora.bases import architecture

    formats.read(weights, architecture.of_folder(base_folder))


def kohya_name(model: str) -> str:
    """Returns the name of the bundle's file for ComfyUI and A1111, which show this name to their users.

    diffusers' `load_lora_weights`, given the folder, still loads the other file, whose name it prefers.
    """
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


def _write_kohya(folder: Path, model: str, base: Base, base_folder: Path, alpha: float | None) -> Path:
    """Writes the kohya file and returns it. Raises UserError where its effect is not exactly the diffusers file's."""
    from lcmlora.adapters import formats
    from lcmlora.bases import architecture

    out = folder / kohya_name(model)
    structure = replace(architecture.of_folder(base_folder), resolution=base.resolution)
    error = formats.write(formats.read(folder / WEIGHTS, structure), out, formats.KOHYA, structure, alpha=alpha)
    if error:
        raise UserError(f"{out}: its effect is {error:.1e} away from that of {WEIGHTS}, expected none; not released")
    return out


def _write_checksums(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    sums = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)
    (folder / CHECKSUMS).write_text(sums, encoding="utf-8")


class ReloadCheck:
    """Loads adapters into a plain diffusers pipeline, as any user would, and compares them with the trained student.

    Args:
        release: a folder with the weights and scheduler_config.json.
        probe: outputs of the student and of the base on fixed inputs, which distillation wrote.
        precision: `auto`, `fp32` or `bf16`, as the base was loaded for distillation.

    Raises:
        UserError: diffusers cannot load the base or the scheduler, or these do not go together.
    """

    def __init__(self, release: Path, base: Base, base_folder: Path, probe: Path, precision: str) -> None:
        import torch
        from safetensors.torch import load_file

        from lcmlora.bases import diffusers_pipeline, pick_device, pick_dtype

        # The precision of the probe: adapters of half-precision bases are saved in fp16, all others in fp32.
        first = next(iter(load_file(release / WEIGHTS).values()))
        self._base_folder = base_folder
        self._device = pick_device("auto")
        dtype = torch.float32 if first.dtype == torch.float32 else pick_dtype(precision, self._device)
        self._pipeline = diffusers_pipeline.assemble_pipeline(base_folder, release / SCHEDULER, base.variant, dtype).to(
            self._device
        )
        self._probe = {name: tensor.to(self._device) for name, tensor in load_file(probe).items()}

    def run(self, weights: Path) -> Proof:
        """Loads an adapter file of either format and compares one forward with the trained student's.

        Raises:
            UserError: with the figure that is outside its limit.
        """
        import torch
        from safetensors.torch import load_file

        from lcmlora.bases import diffusers_pipeline

        written = load_file(weights)
        self._load(weights)
        family, network = diffusers_pipeline.family_of(self._pipeline), diffusers_pipeline.network_of(self._pipeline)
        expected = sum(not name.endswith(".alpha") for name in written)
        loaded = sum(".lora_A." in name or ".lora_B." in name for name, _ in network.named_parameters())
        if loaded != expected:
            raise UserError(
                f"{weights}: holds {expected} LoRA tensors and plain diffusers loaded {loaded}; not released"
            )
        inputs = dict(self._probe)
        student, bare = inputs.pop("student"), inputs.pop("base")
        with torch.no_grad():
            output = family.forward(network, inputs.pop("latents"), inputs.pop("timesteps"), inputs)
        scale = student.abs().max()
        error, effect = (((output - student).abs().max() / scale).item(), ((student - bare).abs().max() / scale).item())
        stored = next(tensor.dtype for name, tensor in written.items() if not name.endswith(".alpha"))
        tolerance = _TOLERANCE[str(stored).removeprefix("torch.")]
        if not effect > 0:
            raise UserError(
                f"{weights}: the adapter has no effect (student and base differ by {effect:g}); not released"
            )
        if not error < tolerance:
            raise UserError(
                f"{weights}: reloaded by plain diffusers, its output is {error:.1e} of the largest value away from the "
                f"trained student's, expected less than {tolerance:g}; not released, distil again"
            )
        # With an effect smaller than the tolerance, an adapter that was not loaded would pass the check above.
        if not error < effect / 2:
            raise UserError(
                f"{weights}: reloaded, it differs by {error:.1e}, and its effect is only {effect:.1e}; not released"
            )
        return Proof(error=error, effect=effect, tensors=loaded)

    def _load(self, weights: Path) -> None:
        from lcmlora.adapters import tensorfile

        self._pipeline.unload_lora_weights()
        tensorfile.check_harmless(weights)
        try:
            self._pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{weights}: plain diffusers cannot load it on {self._base_folder}: {reason}") from error


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


def _git(root: Path) -> Commit:
    """Returns the commit of the project's repository, and whether tracked files of the project differ from it.

    Both are None outside a repository.
    """

    def output_of(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # Results that the pipeline itself has just written do not make the code dirty.
    results = [f":(exclude){name}" for name in ("dvc.lock", "resolved.yaml", "metrics", "plots")]
    changes = output_of("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    commit = output_of("rev-parse", "--verify", "HEAD")
    return Commit(commit=commit, dirty=None if commit is None or changes is None else bool(changes))
