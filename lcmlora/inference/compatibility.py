"""Stage `compatibility`: the student together with what people add to the base, against the teacher with the same.

With each addition the teacher draws two sets, guided and in many steps, and the student one set for each number of
steps. The student's excess is its distance to the teacher's set less the distance of the teacher's two sets. It is
compared with its excess without any addition. Everything is drawn by diffusers' pipelines, as people do.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmlora import bases
from lcmlora.adapters import tensorfile
from lcmlora.adapters.metadata import FACTS, SCHEDULER, WEIGHTS, Distilled, Sampler, read_sampler
from lcmlora.bases import diffusers_pipeline, folders
from lcmlora.config import Base, Compatibility, Data, Evaluation, digest
from lcmlora.data.sources.source import Record, open_picture
from lcmlora.diffusion import noise
from lcmlora.diffusion.editing import check_steps
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons import compatibility as figures
from lcmlora.evaluation.figures import STUDENT, FeatureSet, Key
from lcmlora.evaluation.image_sets import NotFinite
from lcmlora.evaluation.measures import features as feature_sets
from lcmlora.evaluation.measures.bootstrap import LEVEL, Bootstrap, interval
from lcmlora.evaluation.measures.distances import distance
from lcmlora.evaluation.reference import check_count
from lcmlora.evaluation.sets.captions import reporting, reporting_seeds
from lcmlora.inference.additions import Addition, ControlNet, IpAdapter, additions_of
from lcmlora.inference.pipelines import Drawer
from lcmlora.io.files import atomic_write, sha256_file
from lcmlora.plugins import SOURCES
from lcmlora.progress import track
from lcmlora.stages import VERSIONS

if TYPE_CHECKING:
    from lcmlora.bases.examination.library_config import LibraryConfig
    from lcmlora.bases.schedule import Schedule
    from lcmlora.evaluation.measures.features import Features

TEACHER, AGAIN = "teacher", "teacher/again"
_ADAPTER = "lcm"  # the acceleration's name in a pipeline


@dataclass(frozen=True)
class Inputs:
    """What the stage reads, and how it draws.

    adapter: the folder that `distill` wrote.
    data: the pictures, with paths relative to the current folder.
    pictures: the folder that `prepare` wrote.
    root: of the project, which paths of additions are relative to.
    """

    model: str
    base: Base
    base_folder: Path
    adapter: Path
    data: Data
    pictures: Path
    evaluation: Evaluation
    settings: Compatibility
    root: Path


def try_additions(inputs: Inputs, scratch: Path, out: Path) -> figures.Compatibility:
    """Draws with every addition, compares, and writes the figures to the file `out`.

    Args:
        scratch: folder in which a run that was killed left what it drew.

    Raises:
        UserError: an addition is missing or does not fit, or there are too few pictures for the features.
    """
    additions = additions_of(inputs.settings, inputs.root)
    drawing = _Drawing(inputs, scratch)
    has_pictures = SOURCES.get(inputs.data.source).has_pictures
    left_out = {
        each.name: "the data are prompts, without real pictures"
        for each in additions
        if each.needs_pictures and not has_pictures
    }
    sets = {each.name: drawing.sets(each) for each in additions if each.name not in left_out}
    found = _compare(drawing, {each.name: each for each in additions}, sets, left_out)
    atomic_write(out, found.write)
    shutil.rmtree(scratch)
    return found


class _Drawing:
    """Draws the sets of each addition, and keeps what it drew in the scratch folder, a batch at a time."""

    def __init__(self, inputs: Inputs, scratch: Path) -> None:
        evaluation, settings = inputs.evaluation, inputs.settings
        self.inputs, self._scratch = inputs, scratch
        self.device = bases.pick_device(evaluation.device)
        self.features: Features = feature_sets.load(evaluation.features, self.device, evaluation.features_source)
        check_count("compatibility.pictures", settings.pictures, self.features)
        captions = reporting(inputs.pictures, settings.pictures)
        self.prompts = captions.prompts
        self.shown = [self.prompts[i % len(self.prompts)] for i in range(settings.pictures)]
        self._records = _records_of(captions.records, self.shown)
        facts = Distilled.read(inputs.adapter / FACTS)
        self.sampler: Sampler = read_sampler(facts.sampler.plain(), f"{inputs.adapter / FACTS}: sampler")
        self.adapter = sha256_file(inputs.adapter / WEIGHTS)
        self.base = str(folders.identity(inputs.base, inputs.base_folder)["digest"])
        self.seeds = reporting_seeds(evaluation.seed)

    @property
    def students(self) -> dict[Key, int]:
        """The student's steps by the names of its sets."""
        return {Key.of(STUDENT, steps): steps for steps in sorted(self.inputs.settings.steps)}

    def sets(self, addition: Addition) -> dict[str, Tensor | str]:
        """Returns the features (N, D) of each set with this addition by its name, or why it could not be drawn."""
        teacher = _Once(lambda: self._teacher(addition))
        drawn: dict[str, Tensor | str] = {}
        for name, seed in ((TEACHER, self.seeds.teacher), (AGAIN, self.seeds.compared)):
            if reason := self._impossible_for_teacher(addition):
                drawn[name] = reason
                continue
            with _explaining(drawn, name):
                draw = partial(self._by_teacher, addition, teacher)
                drawn[name] = self._set(addition, name, seed, draw)
        student = _Once(lambda: self._student(addition))
        for key, steps in self.students.items():
            if reason := self._impossible(addition, steps):
                drawn[key] = reason
                continue
            with _explaining(drawn, key):
                draw = partial(self._by_student, addition, student, steps)
                drawn[key] = self._set(addition, key, self.seeds.compared, draw)
        return drawn

    def _impossible_for_teacher(self, addition: Addition) -> str | None:
        steps, strength = self.inputs.evaluation.teacher_steps, addition.strength
        if strength is None or int(steps * strength) > 0:  # as the pipelines of diffusers count
            return None
        return f"the teacher's {steps} steps leave none at strength {strength:g}"

    def _impossible(self, addition: Addition, steps: int) -> str | None:
        """Returns why the student cannot take so many steps with this addition; None if it can."""
        try:
            check_steps(self.sampler, steps, addition.strength)
        except UserError as error:
            return str(error)
        return None

    def _set(self, addition: Addition, name: str, seed: int, draw: Callable[[range, int], Tensor]) -> Tensor:
        """Returns the features (N, D) of a set, of which a batch that is in the scratch folder is not drawn again."""
        inputs = self.inputs
        made_by = digest(
            {"version": VERSIONS["compatibility"], "base": self.base, "added": addition.facts, "of": addition.name},
            {"set": name, "seed": seed, "prompts": self.prompts, "side": inputs.base.resolution},
            {"adapter": self.adapter if name in self.students else None, "features": self.features.name},
            {"steps": inputs.evaluation.teacher_steps, "guidance": inputs.evaluation.guidance_scale},
        )[:20]
        found, batch, count = [], inputs.evaluation.batch, len(self.shown)
        for start in track(range(0, count, batch), f"{addition.name}, {name}", unit=batch):
            rows = range(start, min(start + batch, count))
            kept = self._scratch / f"{made_by}-{rows.start:06d}-{rows.stop:06d}.safetensors"
            if not kept.exists():
                pictures = draw(rows, seed)
                vectors = {"features": self.features(pictures.to(self.device).float() / 255).half().cpu()}
                atomic_write(kept, lambda path, vectors=vectors: save_file(vectors, path))  # type: ignore[misc]
            found.append(load_file(kept)["features"])
        return torch.cat(found)

    def _pipeline(self, addition: Addition) -> Any:
        """Returns the base with the addition and the adapter's scheduler, without the adapter."""
        inputs = self.inputs
        dtype = bases.pick_dtype("auto", self.device)
        pipeline = diffusers_pipeline.assemble_pipeline(
            inputs.base_folder, inputs.adapter / SCHEDULER, inputs.base.variant, dtype
        ).to(self.device)
        pipeline.watermark = None  # of SDXL, which is drawn only where a certain package is installed
        return addition.added(pipeline)

    def _teacher(self, addition: Addition) -> Any:
        import diffusers

        pipeline = self._pipeline(addition)
        _, config = self._schedule(pipeline)
        # As `sampling.sample_solver` has it: latents are not confined to [-1, 1].
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
        _fuse(pipeline, addition.loras)
        drawing = addition.teacher(pipeline)
        drawing.set_progress_bar_config(disable=True)
        return drawing

    def _student(self, addition: Addition) -> Drawer:
        inputs, pipeline = self.inputs, self._pipeline(addition)
        weights = inputs.adapter / WEIGHTS
        tensorfile.check_harmless(weights)
        pipeline.load_lora_weights(inputs.adapter, weight_name=WEIGHTS, adapter_name=_ADAPTER, use_safetensors=True)
        _fuse(pipeline, {_ADAPTER: 1.0} | addition.loras)
        schedule, _ = self._schedule(pipeline)
        return Drawer(
            name=inputs.model,
            pipeline=pipeline,
            sampler=self.sampler,
            resolution=inputs.base.resolution,
            schedule=schedule.to(self.device),
            has_controlnet=isinstance(addition, ControlNet),
            has_ip_adapter=isinstance(addition, IpAdapter),
        )

    def _schedule(self, pipeline: Any) -> tuple[Schedule, LibraryConfig]:
        """Returns the base's own noise schedule, and the configuration of its scheduler."""
        return diffusers_pipeline.family_of(pipeline).schedule(self.inputs.base_folder, self.inputs.base.resolution)

    def _by_teacher(self, addition: Addition, pipeline: Callable[[], Any], rows: range, seed: int) -> Tensor:
        """Returns the teacher's pictures (B, 3, H, W) uint8 of these rows. Raises NotFinite."""
        side, evaluation = self.inputs.base.resolution, self.inputs.evaluation
        pictures = [self._picture(row) for row in rows] if addition.needs_pictures else []
        drawn = pipeline()(
            [self.shown[row] for row in rows],
            num_inference_steps=evaluation.teacher_steps,
            guidance_scale=float(evaluation.guidance_scale),
            generator=[noise.generator(seed, row, 0) for row in rows],
            output_type="pt",
            **addition.teacher_inputs(pictures, side),
        ).images
        if not drawn.isfinite().all():
            raise NotFinite(f"even the teacher draws pictures that are not finite in {drawn.dtype}")
        return drawn.float().mul(255).round().byte()

    def _by_student(
        self, addition: Addition, student: Callable[[], Drawer], steps: int, rows: range, seed: int
    ) -> Tensor:
        """Returns the student's pictures (B, 3, H, W) uint8 of these rows, each from noise of its own.

        Raises:
            NotFinite: they are not finite.
        """
        drawer = student()
        if not addition.needs_pictures:
            drawn = drawer([self.shown[row] for row in rows], steps=steps, seed=_seed_of(seed, rows.start))
        else:
            drawn = [
                drawer(
                    self.shown[row],
                    steps=steps,
                    seed=_seed_of(seed, row),
                    **addition.student_inputs(self._picture(row)),
                )[0]
                for row in rows
            ]
        return torch.stack([_pixels(picture) for picture in drawn])

    def _picture(self, row: int) -> Image.Image:
        return open_picture(self.inputs.data, self._records[row], size=self.inputs.base.resolution)


def _fuse(pipeline: Any, loras: dict[str, float]) -> None:
    """Adds the effect of the pipeline's LoRAs to its weights, which draws the same and nearly twice as fast.

    Args:
        loras: their weights, by their names in the pipeline.
    """
    if loras:
        pipeline.set_adapters([*loras], [*loras.values()])
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


class _Once:
    """Makes a thing when it is first asked for: a pipeline is not loaded where all its batches are in the scratch."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made


@contextlib.contextmanager
def _explaining(drawn: dict[str, Tensor | str], key: str) -> Iterator[None]:
    """Keeps that a set is not finite, which is a finding of this stage and no end of it."""
    try:
        yield
    except NotFinite as error:
        drawn[key] = str(error)


def _compare(
    drawing: _Drawing,
    additions: dict[str, Addition],
    sets: dict[str, dict[str, Tensor | str]],
    left_out: dict[str, str],
) -> figures.Compatibility:
    inputs, kind = drawing.inputs, drawing.features.distance
    resamples = inputs.evaluation.resamples
    bootstrap = None
    if resamples:
        seed = drawing.seeds.compared
        bootstrap = Bootstrap(drawing.shown, resamples=resamples, seed=seed, device=drawing.device)
    plain = _Measured(sets[figures.NOTHING], kind, bootstrap)
    tried = {}
    for name, each in sets.items():
        measured = plain if name == figures.NOTHING else _Measured(each, kind, bootstrap)
        cells = {
            key: measured.cell(key, None if measured is plain else plain, inputs.settings.limit)
            for key in drawing.students
        }
        addition = additions[name]
        tried[name] = figures.Tried(
            kind=addition.kind, title=addition.title, added=addition.facts, floor=measured.floor, cells=cells
        )
    return figures.Compatibility(
        adapter=drawing.adapter,
        base=drawing.base,
        features=FeatureSet(
            name=drawing.features.name, dimensions=drawing.features.dimensions, distance=drawing.features.distance
        ),
        pictures=len(drawing.shown),
        prompts=len(drawing.prompts),
        seeds={"teacher": drawing.seeds.teacher, "compared": drawing.seeds.compared},
        teacher_steps=inputs.evaluation.teacher_steps,
        guidance_scale=inputs.evaluation.guidance_scale,
        resamples=resamples,
        level=LEVEL,
        limit=inputs.settings.limit,
        tried=tried,
        left_out=left_out,
    )


class _Measured:
    """The excess of the student's sets with one addition, and of every resample."""

    def __init__(self, sets: dict[str, Tensor | str], kind: str, bootstrap: Bootstrap | None) -> None:
        self.floor: float | None = None
        self._excess: dict[Key, float] = {}
        self._samples: dict[Key, Tensor] = {}
        self._reasons = {name: each for name, each in sets.items() if isinstance(each, str)}
        teacher, again = sets[TEACHER], sets[AGAIN]
        if isinstance(teacher, str) or isinstance(again, str):
            self._without_teacher = next(each for each in (teacher, again) if isinstance(each, str))
            return
        self._without_teacher = ""
        self.floor = distance(teacher, again, kind)
        drawn = {Key(name): each for name, each in sets.items() if isinstance(each, Tensor) and name not in _TEACHERS}
        self._excess = {key: distance(teacher, each, kind) - self.floor for key, each in drawn.items()}
        if bootstrap and drawn:
            self._samples = bootstrap.excess(teacher, again, drawn, kind)

    def cell(self, key: Key, plain: _Measured | None, limit: float) -> figures.Cell:
        """Returns the finding for some steps.

        Args:
            plain: without an addition; None if this is it.
        """
        if key not in self._excess:
            return figures.Cell(failed=self._without_teacher or self._reasons[key])
        excess, samples = self._excess[key], self._samples.get(key)
        spread = None if samples is None else interval(samples, excess)
        failed = None
        if plain is not None and key in plain._excess:
            # A student without an addition may by chance be nearer to the teacher than the teacher is to itself.
            beyond, low = excess - limit * max(plain._excess[key], 0.0), None
            if samples is not None:
                low, _ = interval(samples - limit * plain._samples[key].clamp(min=0), beyond)
            if (beyond if low is None else low) > 0:
                failed = (
                    f"excess {excess:.3g} is more than {limit:g} times the {plain._excess[key]:.3g} without it"
                    f"{'' if low is None else ', beyond chance'}"
                )
        return figures.Cell(excess=excess, interval=spread, failed=failed)


_TEACHERS = (TEACHER, AGAIN)


def _records_of(records: Sequence[Record], shown: Sequence[str]) -> list[Record]:
    """Returns a real picture for each caption that is shown; pictures of the same caption take turns."""
    by_caption: dict[str, list[Record]] = {}
    for record in records:
        by_caption.setdefault(record.caption, []).append(record)
    turns: dict[str, int] = {}
    found = []
    for caption in shown:
        turn = turns.get(caption, 0)
        found.append(by_caption[caption][turn % len(by_caption[caption])])
        turns[caption] = turn + 1
    return found


def _seed_of(seed: int, row: int) -> int:
    """Returns a seed of 32 bits that no other row has: `Drawer` counts the pictures of one call alone."""
    return (seed * 1_000_003 + row) % 2**32


def _pixels(picture: Image.Image) -> Tensor:
    """A picture -> (3, H, W) uint8."""
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
