"""What all stages of a model will take on a GPU: settings that fit its memory, hours, download and disk.

Bytes of tensors and operations are counted from the architecture (workload.py). What torch and the GPU's driver take
besides, and the share of the GPU's rate that is reached, are assumed, as the constants here and in gpus.py say.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from lcmlora import config, names
from lcmlora.config import Config
from lcmlora.data.latents.encode import ROW_BYTES
from lcmlora.doctor.gpus import Gpu
from lcmlora.doctor.workload import MetaBase, StepUse, levels
from lcmlora.errors import UserError
from lcmlora.evaluation.sets.solver_search import most_evaluations, most_trials
from lcmlora.io.parsing import JsonObject
from lcmlora.plugins import SOURCES
from lcmlora.project import Project
from lcmlora.settings import presets
from lcmlora.settings.training import Polish

# Besides tensors: the driver's context and the libraries' workspaces, and what the allocator leaves unused.
_LEAST_BESIDES, _MOST_BESIDES = 0.5e9, 1.2e9  # bytes
_FRAGMENTS = 1.08  # times the tensors' bytes

FITS, MAY_FIT, TOO_LARGE = "fits", "may fit", "does not fit"

ASSUMED_PICTURES = 10_000

_HALF = 2  # bytes
_COPIES = 3  # of the adapter that stay: adapters/MODEL, and two formats in release/MODEL
_CHECKPOINT = 5  # fp32 copies of the adapter in a checkpoint: weights, average, two moments, the best weights
_CHECKPOINTS = 2  # the next one is written beside it
_LINE = 159  # bytes of a picture in data/pictures/train.jsonl of the emoji
_CLIP = 1.71e9  # bytes of openai/clip-vit-large-patch14-336: 427.9 M parameters in fp32
_ROLLOUT_EVALUATIONS = 1.5  # of the student, on average, before a step that begins at its own states


def needed(tensors: int) -> tuple[float, float]:
    """Returns the least and the most memory of a GPU that work takes, in bytes.

    Args:
        tensors: bytes of its tensors at the peak.
    """
    return tensors + _LEAST_BESIDES, tensors * _FRAGMENTS + _MOST_BESIDES


@dataclass(frozen=True)
class StageForecast:
    """What a stage takes.

    settings: those that decide its memory, by their keys in params.yaml: the person's own if these fit, else others.
    changed: those of them that are others.
    tensors: bytes at the peak, counted.
    verdict: FITS, MAY_FIT or TOO_LARGE; None where no memory is given.
    operations: of the whole stage.
    """

    stage: str
    settings: dict[str, int | str]
    changed: dict[str, int | str]
    tensors: int
    verdict: str | None
    operations: float

    @property
    def needed(self) -> tuple[float, float]:
        """The least and the most memory of the GPU that it takes, in bytes."""
        return needed(self.tensors)


@dataclass(frozen=True)
class Forecast:
    """What a model takes, from nothing to its release. Bytes, and the operations of one GPU or of all together.

    memory: 1e9 bytes of a GPU; None where none was named.
    pictures: in the latent cache; `assumed` where nobody said how many.
    disk: bytes by what they are for.
    """

    name: str
    source: str
    resolution: int
    parameters: int
    lora_parameters: int
    rank: int
    precision: str
    memory: float | None
    pictures: int
    pictures_assumed: bool
    steps: int
    batch: int
    processes: int
    stages: list[StageForecast]
    download: dict[str, float]
    disk: dict[str, float]
    gpus: list[Gpu] = field(default_factory=list)

    @property
    def operations(self) -> float:
        """Of all stages."""
        return sum(stage.operations for stage in self.stages)

    def stage(self, name: str) -> StageForecast:
        """Returns the forecast of this stage. Raises KeyError."""
        return {stage.stage: stage for stage in self.stages}[name]

    def changes(self) -> dict[str, dict[str, int | str]]:
        """Returns the settings to change so that all stages fit, by section."""
        found: dict[str, dict[str, int | str]] = {}
        for stage in self.stages:
            for key, value in stage.changed.items() if stage.verdict != TOO_LARGE else ():
                section, _, name = key.partition(".")
                found.setdefault(section, {})[name] = value
        return found

    def to_json(self) -> str:
        """Returns the forecast as JSON, as `lcmlora doctor --json` prints it."""
        hours = {
            gpu.name: {stage.stage: gpu.hours(stage.operations / self.processes) for stage in self.stages}
            for gpu in self.gpus
        }
        stages = [asdict(stage) | {"needed": stage.needed} for stage in self.stages]
        return json.dumps(asdict(self) | {"counted": True, "stages": stages, "hours": hours}, indent=2)


def forecast(
    settings: Config, model: str, project: Project | None, gpus: Sequence[Gpu] = (), memory: float | None = None,
    pictures: int | None = None, counted: MetaBase | None = None,
) -> Forecast:  # fmt: skip
    """Returns what a model takes with the settings of a project, or with others where those do not fit.

    Args:
        project: whose folder may have the base and the list of pictures; None outside a project.
        gpus: whose hours are wanted. If none of them has bf16, fp16 is counted.
        memory: of the GPU, in 1e9 bytes; without it nothing is compared.
        pictures: in the latent cache; those that `prepare` has listed by default, else ASSUMED_PICTURES.
        counted: the base, where an earlier forecast has counted some of it.

    Raises:
        UserError: there is no such model, or its architecture is not known here.
    """
    return _Counting(settings, model, project, gpus, memory, pictures, counted).forecast()


def outside_projects(base: str) -> tuple[str, Config]:
    """Returns the name of a base and the settings that a project has by default for it, for use outside a project.

    Args:
        base: the name of a published base, its hub id, a diffusers folder, or a .safetensors file.

    Raises:
        UserError: it is none of these, or its family is not known.
    """
    published = presets.load().bases
    name = next((name for name, preset in published.items() if base in (name, preset["source"])), None)
    bases: JsonObject = {}
    if name is None:
        if not Path(base).exists():
            raise UserError(
                f"{base}: no such base; expected {', '.join(published)}, a folder or a .safetensors file, or a name "
                "under `bases` in the params.yaml of a project"
            )
        name = Path(base).resolve().stem
        name = "base" if names.fault(name) else name
        bases = {name: {"source": base, "license": "unknown"}}
    values: JsonObject = {"models": [name], "bases": bases, "data": {"source": "folder", "path": "pictures"}}
    return name, config.parse(values, Path(base))


class _Counting:
    """One forecast in the making."""

    def __init__(
        self, config: Config, model: str, project: Project | None, gpus: Sequence[Gpu], memory: float | None,
        pictures: int | None, counted: MetaBase | None,
    ) -> None:  # fmt: skip
        self._config, self._model, self._gpus, self._memory = config, model, list(gpus), memory
        self._settings = config.distill_for(model)
        self._evaluation, self._encode = config.evaluation_for(model), config.encode_for(model)
        launch = config.launch_for(model)
        self._processes = launch.processes * launch.machines
        self._dtype = _dtype(self._settings.precision, gpus)
        base = config.base(model)
        self._folder = project.base(model) if project else Path(base.source)
        self._base = counted or MetaBase(model, base, self._folder, project.root if project else Path())
        listed = _listed_pictures(project.pictures_of(model, config)) if project else None
        self._assumed = pictures is None and listed is None
        self._pictures = pictures or listed or ASSUMED_PICTURES

    def forecast(self) -> Forecast:
        base, settings = self._base, self._settings
        adapter = base.adapter_parameters(settings)
        download = self._download()
        return Forecast(
            name=self._model,
            source=base.base.source,
            resolution=base.base.resolution,
            parameters=base.parameters,
            lora_parameters=adapter,
            rank=settings.rank,
            precision=str(self._dtype).removeprefix("torch."),
            memory=self._memory,
            pictures=self._pictures,
            pictures_assumed=self._assumed,
            steps=settings.steps,
            batch=settings.batch,
            processes=self._processes,
            stages=[self._encoding(), self._distilling(), *self._polishings(), *self._drawing()],
            download=download,
            disk=self._disk(adapter) | download,
            gpus=self._gpus,
        )

    def _verdict(self, tensors: int) -> str | None:
        if self._memory is None:
            return None
        least, most = needed(tensors)
        free = self._memory * 1e9
        return FITS if most <= free else MAY_FIT if least <= free else TOO_LARGE

    def _first_fitting(
        self, stage: str, candidates: Iterator[dict[str, int | str]], count: Callable[[dict[str, int | str]], int],
        operations: Callable[[dict[str, int | str]], float],
    ) -> StageForecast:  # fmt: skip
        """Returns the stage with the first settings that fit, else the first that may, else those that take least."""
        tried: list[tuple[dict[str, int | str], int, str | None]] = []
        for settings in candidates:
            tensors = count(settings)
            tried.append((settings, tensors, self._verdict(tensors)))
            if tried[-1][2] in (FITS, None):
                break
        taken = [each for wanted in (FITS, None, MAY_FIT) for each in tried if each[2] == wanted]
        settings, tensors, verdict = taken[0] if taken else min(tried, key=lambda each: each[1])
        changed = {key: value for key, value in settings.items() if value != tried[0][0][key]}
        return StageForecast(stage, settings, changed, tensors, verdict, operations(settings))

    def _distilling(self) -> StageForecast:
        settings = self._settings

        def operations(step: StepUse) -> float:
            teacher = step.teacher.operations * (1 - settings.trajectory)
            own = step.target.operations * settings.rollout * _ROLLOUT_EVALUATIONS
            return teacher + own + step.target.operations + step.student.operations

        return self._training("distill", settings.steps, lambda step: step.peak, operations)

    def _polishings(self) -> list[StageForecast]:
        """Returns the stage polish, where params.yaml asks for it."""
        polish = self._settings.polish
        return [] if polish is None else [self._polishing(polish)]

    def _polishing(self, polish: Polish) -> StageForecast:
        """Returns what a polish takes: a second adapter in training, the text encoders, and pictures to validate by."""
        settings, base, evaluation = self._settings, self._base, self._evaluation
        second = base.training_bytes(settings)
        texts = base.text_parameters * self._dtype.itemsize
        # While it validates, there are no gradients and no activations of training.
        drawing = base.drawing(evaluation.batch, self._dtype).peak + 2 * second
        rollout = 1 + statistics.mean((steps - 1) / 2 for steps in polish.student_steps)
        updates = polish.fake_updates + polish.head_start / polish.steps

        def operations(step: StepUse) -> float:
            forward, student = step.target.operations, step.student.operations
            teacher = step.teacher.operations if polish.w else forward
            matching = updates * (rollout * forward + student) + teacher + forward + student
            consistency = step.operations if polish.consistency else 0.0
            anchor = polish.anchor_steps * step.teacher.operations + student if polish.anchor else 0.0
            return matching + consistency + anchor

        found = self._training(
            "polish", polish.steps, lambda step: max(step.peak + second + texts, drawing), operations
        )
        validations = 2 + polish.steps // settings.validate_every
        drawn = validations * sum(polish.student_steps) + 2 * evaluation.teacher_steps
        decoded = validations * len(polish.student_steps) + 1
        each = drawn * self._evaluation_operations + decoded * base.decoding_operations(self._dtype)
        return replace(found, operations=found.operations + each * evaluation.choosing_pictures)

    def _training(
        self, stage: str, steps: int, peak: Callable[[StepUse], int], operations: Callable[[StepUse], float]
    ) -> StageForecast:
        """Returns what the training of an adapter takes.

        Args:
            peak: bytes of the tensors of a step.
            operations: of a step that takes all of a forward's pictures.
        """
        settings, base = self._settings, self._base
        share = settings.batch // self._processes
        uses: dict[tuple[int, str], StepUse] = {}

        def use(tried: dict[str, int | str]) -> StepUse:
            rows, mode = share // int(tried["distill.accumulate"]), str(tried["distill.checkpointing"])
            if (rows, mode) not in uses:
                uses[rows, mode] = base.step(settings, rows, self._dtype, checkpointing=mode)
            return uses[rows, mode]

        def candidates() -> Iterator[dict[str, int | str]]:
            # Dividing a batch costs no operations, and recomputing all activations costs another forward.
            for mode in levels(settings):
                for accumulate in range(settings.accumulate, share + 1):
                    if share % accumulate == 0:
                        yield {"distill.accumulate": accumulate, "distill.checkpointing": mode}

        def whole(tried: dict[str, int | str]) -> float:
            rows = share // int(tried["distill.accumulate"])
            return operations(use(tried)) / rows * settings.batch * steps

        return self._first_fitting(stage, candidates(), lambda tried: peak(use(tried)), whole)

    def _encoding(self) -> StageForecast:
        settings, base = self._encode, self._base
        if SOURCES.get(self._config.data_for(self._model).source).has_pictures:
            each = base.encoding(1, self._dtype).operations

            def peak(rows: int) -> int:
                return base.encoding(rows, self._dtype).peak
        else:
            each = 2 * self._evaluation_operations * settings.rollouts.steps

            def peak(rows: int) -> int:
                return base.drawing(rows, self._dtype).peak

        return self._first_fitting(
            "encode",
            _halved("encode.batch", settings.batch),
            lambda tried: peak(int(tried["encode.batch"])),
            lambda _: each * self._pictures,
        )

    def _drawing(self) -> list[StageForecast]:
        settings, base = self._evaluation, self._base
        fitting = self._first_fitting(
            "evaluate",
            _halved("evaluation.batch", settings.batch),
            lambda tried: base.drawing(int(tried["evaluation.batch"]), self._dtype).peak,
            lambda _: self._drawn(sum(settings.student_steps), len(settings.student_steps)),
        )
        reference = StageForecast(
            "reference", fitting.settings, fitting.changed, fitting.tensors, fitting.verdict, self._reference()
        )
        return [reference, fitting]

    @cached_property
    def _evaluation_operations(self) -> float:
        return self._base.evaluation()

    def _drawn(self, evaluations: float, sets: float) -> float:
        """Returns the operations of drawing sets of `evaluation.pictures`, with so many evaluations for a picture."""
        each = self._evaluation_operations * evaluations + self._base.decoding_operations(self._dtype) * sets
        return each * self._evaluation.pictures

    def _reference(self) -> float:
        """Returns the operations to search the solvers' settings and to draw their sets and the teacher's, at most."""
        settings = self._evaluation
        solvers = len(settings.solvers) * len(settings.solver_evaluations)
        evaluations = 2 * 2 * settings.teacher_steps + len(settings.solvers) * sum(settings.solver_evaluations)
        search = self._evaluation_operations * most_evaluations(settings)
        search += self._base.decoding_operations(self._dtype) * most_trials(settings) * settings.choosing_pictures
        return self._drawn(evaluations, 2 + solvers) + search  # the teacher draws two sets, guided

    def _download(self) -> dict[str, float]:
        """Returns the bytes of what is fetched, or was: of the base's files if it is here."""
        base, found = self._base, {}
        if self._folder.is_dir():
            files = (path for path in self._folder.rglob("*") if path.is_file())
            found["base"] = float(sum(path.stat().st_size for path in files))
        else:
            size = _HALF if base.base.variant in ("fp16", "bf16") else 2 * _HALF
            found["base"] = float(size * (base.parameters + base.vae_parameters + base.text_parameters))
        if "clip" in (self._evaluation.features, self._evaluation.check_features):
            found["image features (CLIP)"] = _CLIP
        return found

    def _disk(self, adapter: int) -> dict[str, float]:
        base, encode = self._base, self._encode
        channels, height, width = base.latent_shape
        rollouts = encode.rollouts.steps + 1 if encode.rollouts.states else 0
        row = _HALF * (2 + rollouts) * channels * height * width + ROW_BYTES
        captions = min(self._pictures * _HALF * base.caption_numbers, encode.text_cache_mb * 2**20)
        cache = float(self._pictures * (row + _LINE) + captions)
        return {
            "latent cache": 0.0 if encode.shards else cache,
            "DVC's copy of it, unless its cache links files": 0.0 if encode.shards else cache,
            "checkpoints, while it trains": float(_CHECKPOINTS * _CHECKPOINT * 4 * adapter),
            "adapter and release, and DVC's copies": float(2 * _COPIES * _HALF * adapter),
        }


def _halved(key: str, batch: int) -> Iterator[dict[str, int | str]]:
    while batch:
        yield {key: batch}
        batch //= 2


def _dtype(precision: str, gpus: Sequence[Gpu]) -> torch.dtype:
    """Returns the precision of the frozen base on these GPUs; bf16 where nothing is known of them."""
    if precision == "auto":
        precision = "bf16" if not gpus or any(gpu.bf16 for gpu in gpus) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _listed_pictures(folder: Path) -> int | None:
    """Returns how many pictures `prepare` has listed for training; None if it has not run."""
    file = folder / "train.jsonl"
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
