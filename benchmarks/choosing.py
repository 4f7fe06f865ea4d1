"""Figures to choose by, and figures to report: an adapter's on validation captions, and on test captions.

Benchmarks that compare objectives or recipes choose among them by the first, and report what was chosen by the second.
Captions and seeds of both are apart (lcmlora/evaluation/sets/captions.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmlora import bases, config
from lcmlora.data.sources.source import write_records
from lcmlora.errors import UserError
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.reference import draw_reference
from lcmlora.evaluation.sets.captions import TEST, VALIDATION, choosing, choosing_seeds
from lcmlora.io.files import sha256_file

CHOOSING, REPORTING = "choosing", "reporting"
_FIGURES = ("features", "pictures", "prompts", "seed", "floor", "excess", "retrieval")


@dataclass(frozen=True)
class Judge:
    """Measures adapters of one base as `evaluate` does.

    Args:
        load: returns the bare base.
        settings: of the reference that the project has, on test captions.
        pictures, reference: of the project.
        work: folder for the reference on validation captions, which is drawn once.
    """

    load: Callable[[], bases.LoadedBase]
    data: config.Data
    settings: config.Evaluation
    pictures: Path
    reference: Path
    work: Path

    def figures(self, adapter: Path, work: Path) -> dict[str, dict[str, Any]]:
        """Returns the adapter's figures on validation captions (`choosing`) and on test captions (`reporting`)."""
        pictures, reference, settings = self._choosing()
        return {
            CHOOSING: self._measured(adapter, settings, pictures, reference, work / CHOOSING),
            REPORTING: self._measured(adapter, self.settings, self.pictures, self.reference, work / REPORTING),
        }

    def _measured(
        self, adapter: Path, settings: config.Evaluation, pictures: Path, reference: Path, work: Path
    ) -> dict[str, Any]:
        out = work / "evaluation"
        places = (work / "drawn", out, work / "metrics.json", work / "steps.csv", work / "timings")
        found = evaluate_student(self.load(), adapter, self.data, settings, pictures, reference, *places).plain()
        return {name: found[name] for name in _FIGURES}

    def _choosing(self) -> tuple[Path, Path, config.Evaluation]:
        """Returns pictures, reference and settings of an evaluation on validation captions."""
        validation = choosing(self.pictures)
        if not validation.prompts:
            raise UserError(f"{self.pictures / VALIDATION}: holds no captions to choose by; raise data.validation")
        # What is chosen among are adapters: one solver that costs little stands for all.
        changes = {
            "seed": choosing_seeds(self.settings.seed).teacher,
            "solvers": [{"solver": "ddim", "guidance_scale": 1.0}],
            "solver_evaluations": [2],
        }
        settings = config.Evaluation.model_validate(self.settings.model_dump() | changes)
        work = self.work / sha256_file(self.pictures / VALIDATION)[:12]
        pictures, reference = work / "pictures", work / "reference"
        if not reference.is_dir():
            pictures.mkdir(parents=True, exist_ok=True)
            write_records(pictures / TEST, validation.records)
            write_records(pictures / VALIDATION, [])
            draw_reference(self.load(), self.data, settings, pictures, work / "drawn", reference, work / "timings")
        return pictures, reference, settings


def best(runs: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Returns the entry that is nearest to the teacher at so many steps, on validation captions and in the mean."""

    def mean(name: str) -> float:
        return sum(run[CHOOSING]["excess"][f"student@{steps}"] for run in runs[name]) / len(runs[name])

    return min(runs, key=mean)
