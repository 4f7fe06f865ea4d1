"""Making the release bundle of one adapter: packed, reloaded in plain diffusers as a check, sealed with checksums."""

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
from lcmlora.adapters.metadata import FACTS, SCHEDULER, WEIGHTS, Distilled
from lcmlora.config import Base, Config
from lcmlora.errors import UserError
from lcmlora.evaluation import timings
from lcmlora.evaluation.figures import Metrics, Study
from lcmlora.evaluation.gate import gate
from lcmlora.evaluation.study import STUDY
from lcmlora.io.files import atomic_folder, sha256_file
from lcmlora.io.parsing import read_yaml
from lcmlora.io.terminal import note
from lcmlora.project import Project
from lcmlora.releases.bundle import (
    CHECKSUMS,
    METRICS,
    PROVENANCE,
    REPORT,
    Commit,
    Decision,
    Kohya,
    Proof,
    Provenance,
    StageSettings,
    digest,
)
from lcmlora.releases.card import render_card
from lcmlora.releases.report import render_report

# Largest allowed difference between reloaded and trained student, as a share of the student's largest output. In fp32
# both run the same kernels; a half-precision base may be reloaded on another device than it was trained on.
_TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-2}


def package(model: str, config: Config, project: Project, base_folder: Path) -> Provenance:
    """Makes the bundle of a model and returns its provenance. The folder appears whole or not at all.

    Where this machine did not measure how long drawing takes (`Project.timings`), the bundle says nothing of it.

    Args:
        base_folder: the base that the adapter was distilled with.

    Raises:
        UserError: an input is missing, or the packed weights, reloaded by plain diffusers from either of their files,
            do not draw as the trained student did.
    """
    base = config.base(model)
    adapter, evaluation, studied = project.adapter(model), project.evaluation(model), project.study(model)
    evaluated = Metrics.read(project.metrics(model))
    measured = _timings_of(model, evaluated, project.timings(model))
    figures = evaluated.joined(measured, *_study_of(adapter, studied))
    made = Distilled.read(adapter / FACTS)
    failures = gate(figures, config.gate)
    with atomic_folder(project.release(model)) as folder:
        for source, name in (
            (adapter / WEIGHTS, WEIGHTS),
            (adapter / SCHEDULER, SCHEDULER),
            (evaluation / "grid.png", "grid.png"),
        ):
            if not source.is_file():
                raise UserError(f"{source}: no such file; run the stages before package@{model} first")
            shutil.copyfile(source, folder / name)
        _check_adapter(folder / WEIGHTS, base_folder)
        witness = Witness(folder, base, base_folder, adapter / "probe.safetensors", config.distill_for(model).precision)
        proof = witness.prove(folder / WEIGHTS)
        kohya = folder / kohya_name(model)
        _export(folder / WEIGHTS, kohya, base, base_folder, made.distill["alpha"])
        provenance = Provenance(
            model=model,
            packaged=_now(),
            sha256=digest(folder),
            base=made.base | {"variant": base.variant},
            resolution=base.resolution,
            sampler=made.sampler,
            data_digest=made.data_digest,
            data_dvc=_dvc_digest(project, project.pictures_of(model, config)),
            seed=made.seed,
            params=_stage_settings(model, config, made),
            versions=made.versions | {"python": platform.python_version(), "lcmlora": __version__},
            git=_git(project.root),
            dvc_lock=sha256_file(project.dvc_lock) if project.dvc_lock.is_file() else None,
            gate=Decision(passed=not failures, failures=failures),
            reloaded=proof,
            kohya=Kohya(file=kohya.name, sha256=sha256_file(kohya), reloaded=witness.prove(kohya)),
        )
        if config.has_own_data(model):
            pictures = project.own_pictures(model).relative_to(project.root)
            provenance = provenance.model_copy(update={"pictures": pictures.as_posix()})
        figures.write(folder / METRICS)
        provenance.write(folder / PROVENANCE)
        page = render_report(
            model,
            figures,
            provenance,
            [evaluation, studied] if figures.variations or figures.guidance or figures.weights else [evaluation],
            base_license=base.license,
            kohya_file=kohya.name,
        )
        (folder / REPORT).write_text(page, encoding="utf-8")
        (folder / "README.md").write_text(
            render_card(model, base, made, figures, failures, kohya.name), encoding="utf-8"
        )
        _seal(folder)
    return provenance


def _stage_settings(model: str, config: Config, made: Distilled) -> StageSettings:
    settings = {
        "data": config.data_for(model),
        "encode": config.encode_for(model),
        "evaluation": config.evaluation_for(model),
        "gate": config.gate,
    }
    plain = {stage: each.model_dump(mode="json") for stage, each in settings.items()}
    return StageSettings.model_validate(plain | {"distill": made.distill})


def _check_adapter(weights: Path, base_folder: Path) -> None:
    """Raises UserError where the weights are no finite adapter of this base."""
    from lcmlora.adapters import formats
    from lcmlora.bases import architecture

    formats.read(weights, architecture.of_folder(base_folder))


def kohya_name(model: str) -> str:
    """Returns the name of the bundle's file for ComfyUI and A1111, which show it to their users.

    `load_lora_weights` of diffusers, given the folder, still takes the other: it prefers a file of that name.
    """
    return f"lcm-lora-{model}.safetensors"


def _timings_of(model: str, figures: Metrics, folder: Path) -> timings.Measured:
    """Returns what this machine measured of this very adapter, besides the figures that every machine gets."""
    file = folder / timings.EVALUATION
    found = timings.read(file, reference_digest=figures.reference_digest, adapter=figures.adapter)
    if not found.seconds_per_picture:
        note(
            f"{folder}: has no latencies of this adapter, which was evaluated on another machine; the release has "
            f"none (`dvc repro --force --single-item evaluate@{model}` measures them here)"
        )
    return found


def _study_of(adapter: Path, studied: Path) -> list[Study]:
    """Returns the figures of a study of this very adapter; none where there is no such study."""
    if not (studied / STUDY).is_file():
        return []
    found = Study.read(studied / STUDY)
    return [found] if found.adapter == sha256_file(adapter / WEIGHTS) else []


def _export(weights: Path, out: Path, base: Base, base_folder: Path, alpha: float) -> None:
    """Writes the kohya file. Raises UserError where it would not have the diffusers file's effect to the last bit."""
    from lcmlora.adapters import formats
    from lcmlora.bases import architecture

    structure = replace(architecture.of_folder(base_folder), resolution=base.resolution)
    error = formats.write(formats.read(weights, structure), out, formats.KOHYA, structure, alpha=alpha)
    if error:
        raise UserError(f"{out}: its effect is {error:.1e} away from that of {WEIGHTS}, expected none; not released")


def _seal(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    sums = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)
    (folder / CHECKSUMS).write_text(sums, encoding="utf-8")


class Witness:
    """Plain diffusers with the base, in which adapters are loaded as any user would and compared with the student.

    Args:
        release: a folder with the weights and scheduler_config.json.
        probe: the student's and the base's outputs on fixed inputs, written when the student was in memory.
        precision: `auto`, `fp32` or `bf16`, as the base was loaded for distillation.

    Raises:
        UserError: diffusers cannot load the base or the scheduler, or these do not go together.
    """

    def __init__(self, release: Path, base: Base, base_folder: Path, probe: Path, precision: str) -> None:
        import torch
        from safetensors.torch import load_file

        from lcmlora.bases import diffusers_pipeline, pick_device, pick_dtype

        # An adapter of a half-precision base is saved in fp16, so its file tells how the probe was computed.
        first = next(iter(load_file(release / WEIGHTS).values()))
        self._base_folder = base_folder
        self._device = pick_device("auto")
        dtype = torch.float32 if first.dtype == torch.float32 else pick_dtype(precision, self._device)
        self._pipeline = diffusers_pipeline.assemble_pipeline(base_folder, release / SCHEDULER, base.variant, dtype).to(
            self._device
        )
        self._probe = {name: tensor.to(self._device) for name, tensor in load_file(probe).items()}

    def prove(self, weights: Path) -> Proof:
        """Loads the adapter of one file, in whatever format, and compares one forward with the student's.

        Raises:
            UserError: naming the figure that is off.
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
        # An adapter whose effect drowns in the tolerance would pass the line above without being loaded at all.
        if not error < effect / 2:
            raise UserError(
                f"{weights}: reloaded it differs by {error:.1e}, its effect is only {effect:.1e}; not released"
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
    """Returns the digest under which dvc.lock has the prepared pictures, None where it has not."""
    out = pictures.relative_to(project.root).as_posix()
    try:
        stages = read_yaml(project.dvc_lock)["stages"].values()
        found = (entry for stage in stages for entry in stage.get("outs", ()) if entry.get("path") == out)
        return next((entry.get("md5") for entry in found), None)
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _now() -> str:
    """Returns the time, or the one that SOURCE_DATE_EPOCH gives, as builds that are to give the same bytes set it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is not None and not re.fullmatch(r"\d{1,11}", epoch):
        raise UserError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {epoch!r}")
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _git(root: Path) -> Commit:
    """Returns the commit of the repository that a project lies in, and whether the project's tracked files differ from
    it; both are None outside a repository."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None
        return answer.stdout.strip()

    # Results that the pipeline itself has just written do not make the code dirty.
    written = [f":(exclude){name}" for name in ("dvc.lock", "resolved.yaml", "metrics", "plots")]
    changes = ask("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    commit = ask("rev-parse", "--verify", "HEAD")
    return Commit(commit=commit, dirty=None if commit is None or changes is None else bool(changes))
