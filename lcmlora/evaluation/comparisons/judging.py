"""Figures of a student in training: its pictures of validation captions beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Evaluation
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons.measuring import variety
from lcmlora.evaluation.image_sets import ImageSets, StudentSettings
from lcmlora.evaluation.measures.distances import named
from lcmlora.evaluation.measures.metrics import retrieval_at_1
from lcmlora.evaluation.sets.captions import VALIDATION, choosing, choosing_seeds
from lcmlora.evaluation.sets.drawing import load_features


@dataclass(frozen=True)
class TeacherJudge:
    """Draws with a base whose adapter is in training, and measures the pictures.

    Captions, seeds and number of pictures are those by which solvers' settings are chosen, so that no report uses them.

    steps: the numbers of steps with which it draws.
    teacher: (N, D), the features of the teacher's pictures.
    """

    image_sets: ImageSets
    seed: int
    steps: Sequence[int]
    teacher: Tensor

    @classmethod
    def of(
        cls, base: LoadedBase, settings: Evaluation, pictures: Path, steps: Sequence[int], scratch: Path
    ) -> TeacherJudge:
        """Draws the teacher's pictures.

        Args:
            base: with all its parts and without an adapter.
            pictures: the folder that `prepare` wrote.
            scratch: folder in which the teacher's pictures are kept until the training has ended.

        Raises:
            UserError: there are no validation captions.
        """
        prompts, seeds = choosing(pictures, settings.choosing_pictures).prompts, choosing_seeds(settings.seed)
        if not prompts:
            raise UserError(
                f"{pictures / VALIDATION}: holds no captions, and a polish chooses its weights by what the student "
                "draws of them; raise data.validation, or give the set more captions"
            )
        image_sets = ImageSets(
            base, load_features(base, settings), prompts, settings.choosing_pictures, settings.batch, 0, scratch
        )
        teacher = SolverSettings.of("ddim", settings.teacher_steps, settings.guidance_scale)
        drawn = image_sets.draw("teacher, to choose weights by", teacher, seeds.teacher)
        return cls(image_sets, seeds.compared, steps, drawn.features)

    def __call__(self, sampler: Sampler) -> dict[str, float]:
        """Returns `distance@N`, `retrieval@N` and `diversity@N` for each number of steps.

        The distance is to the teacher's pictures, and so is the gallery of retrieval.
        """
        captions, found = self.image_sets.shown, {}
        distance = named(self.image_sets.features.distance)
        student = replace(self.image_sets, scratch=None)  # the weights are others each time
        for steps in self.steps:
            label = f"student, {steps} steps"
            drawn = student.draw(label, StudentSettings(steps, sampler), self.seed, quiet=True).features
            found[f"distance@{steps}"] = distance.between_few(self.teacher, drawn)
            found[f"retrieval@{steps}"] = retrieval_at_1(drawn, captions, self.teacher, captions)
            spread = variety(drawn, captions, self.teacher)
            if spread is not None:
                found[f"diversity@{steps}"] = spread
        return found
