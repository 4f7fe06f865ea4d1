"""Polish against more of the same distillation, over several seeds: python -m benchmarks.polish [--seeds 3] ...

For each seed it distils the model's adapter as params.yaml says (start), polishes that adapter with the settings of
`--polish`, and distils another one with as many more steps as cost as many network evaluations as the polish (more). An
evaluation with gradients counts for three. With seed 0 alone, `--others` are polishes of other settings, and `--long`
is a distillation that shows where training leads by itself. All are measured as `evaluate` does, on validation
captions, by which a recipe is chosen, and on test captions, on which it is reported. A run that is finished is kept in
--scratch and not repeated, so the command can be stopped and started again. Writes docs/polish.json and the tables in
docs/polish.md. Run `dvc repro encode@MODEL reference@MODEL` first.

Example: python -m benchmarks.polish --seeds 1 --polish '{"steps": 100, "lr": 2.5e-4, "fake_lr": 5e-4}'
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.choosing import Judge
from benchmarks.objectives import publish
from lcmlora import bases, config
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import folders
from lcmlora.bases.families import Conditioning
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.distillation.polish import polish_adapter
from lcmlora.evaluation.comparisons.judging import TeacherJudge
from lcmlora.io.files import write_json
from lcmlora.settings.training import Polish
from lcmlora.training.loop import NullLogger

START, POLISH, MORE, LONG = "start", "polish", "more of the same", "long distillation"
_WITH_GRADIENT = 3  # forwards that one with its backward pass costs


def a_step(settings: config.Distill) -> int:
    """Returns the evaluations of a step of a distillation: two of the teacher, one of the target, the student's."""
    return settings.batch * (2 + 1 + _WITH_GRADIENT)


class Counted:
    """A base that counts its network evaluations, one for each picture of a forward."""

    def __init__(self, base: bases.LoadedBase) -> None:
        self.base, self.evaluations = base, 0
        predict = base.predict

        def counting(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            self.evaluations += len(x) * (_WITH_GRADIENT if torch.is_grad_enabled() else 1)
            return predict(x, t, conditioning)

        object.__setattr__(base, "predict", counting)


class Runs:
    """The runs of one model."""

    def __init__(self, settings: config.Config, model: str, scratch: Path) -> None:
        self.settings, self.model, self.scratch = settings, model, scratch
        self.cache = LatentCache(Path("data/latents", model))
        self.folder, self.pictures = Path("bases", model), Path("data/pictures")
        self.identity = folders.identity(settings.base(model), self.folder)

    def load(self) -> bases.LoadedBase:
        distill = self.settings.distill_for(self.model)
        device = bases.pick_device(distill.device)
        dtype = bases.pick_dtype(distill.precision, device)
        return bases.load(self.model, self.settings.base(self.model), self.folder, device=device, dtype=dtype)

    def distilled(self, seed: int, steps: int, **others: Any) -> tuple[Path, dict[str, Any]]:
        """Returns the folder and the figures of a distillation of so many steps, with other settings of `distill`."""
        plain = self.settings.distill_for(self.model).model_dump(mode="json")
        distill = config.Distill.model_validate(plain | others | {"seed": seed, "steps": steps})
        name = f"distilled-{seed}-{steps}" + (f"-{config.digest(others)[:8]}" if others else "")

        def train(counted: Counted, work: Path) -> None:
            places = (work, work / "adapter")
            distill_adapter(counted.base, self.cache, distill, *places, identity=self.identity, logger=NullLogger())
            counted.evaluations = steps * a_step(distill)  # without those of the validation

        return self._run(name, distill, train)

    def polished(self, seed: int, polish: Polish) -> tuple[Path, dict[str, Any]]:
        """Returns the folder and the figures of a polish of the distillation that params.yaml asks for."""
        first = self.settings.distill_for(self.model)
        start, _ = self.distilled(seed, first.steps)
        distill = first.model_copy(update={"seed": seed, "polish": polish})
        evaluation = self.settings.evaluation_for(self.model)

        def train(counted: Counted, work: Path) -> None:
            steps = polish.student_steps
            judge = TeacherJudge.of(counted.base, evaluation, self.pictures, steps, work / "judge")
            counted.evaluations = 0

            def uncounted(sampler: Sampler) -> dict[str, float]:
                kept = counted.evaluations
                figures = judge(sampler)
                counted.evaluations = kept
                return figures

            polish_adapter(
                counted.base,
                self.cache,
                distill,
                start / "adapter",
                work,
                work / "adapter",
                identity=self.identity,
                logger=NullLogger(),
                judge=uncounted,
            )

        digest = config.digest(polish.model_dump(mode="json"))[:8]
        return self._run(f"polished-{seed}-{digest}", distill, train)

    def _run(
        self, name: str, distill: config.Distill, train: Callable[[Counted, Path], None]
    ) -> tuple[Path, dict[str, Any]]:
        work = self.scratch / f"{self.model}-{name}"
        path = work / "figures.json"
        if path.exists():
            return work, json.loads(path.read_text())
        print(name, flush=True)
        work.mkdir(parents=True, exist_ok=True)
        counted, began = Counted(self.load()), time.monotonic()
        train(counted, work)
        found: dict[str, Any] = {
            "seconds": time.monotonic() - began,
            "evaluations": counted.evaluations,
            "settings": distill.model_dump(mode="json"),
        }
        judge = Judge(
            self.load,
            self.settings.data,
            self.settings.evaluation_for(self.model),
            self.pictures,
            Path("reference", self.model),
            self.scratch / f"{self.model}-choosing",
        )
        found |= judge.figures(work / "adapter", work)
        write_json(path, found)
        return work, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--polish", type=json.loads, default={}, help="settings of distill.polish, as JSON")
    parser.add_argument(
        "--others", type=json.loads, default=[], help="changes of --polish, as a JSON list; a polish for each"
    )
    parser.add_argument("--long", type=json.loads, help="settings of distill, as JSON, its steps among them")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/polish"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()

    settings = config.load(Path("params.yaml"))
    made, polish = Runs(settings, options.model, options.scratch), Polish.model_validate(options.polish)
    first = settings.distill_for(options.model)
    runs: dict[str, list[dict[str, Any]]] = {START: [], MORE: [], POLISH: []}
    for seed in range(options.seeds):
        _, start = made.distilled(seed, first.steps)
        _, polished = made.polished(seed, polish)
        _, more = made.distilled(seed, first.steps + round(polished["evaluations"] / a_step(first)))
        for name, figures in ((START, start), (MORE, more), (POLISH, polished)):
            runs[name].append(figures)
    for changes in options.others:
        changed = Polish.model_validate(polish.model_dump() | changes)
        named = ", ".join(f"{key} {value}" for key, value in changes.items())
        runs[f"{POLISH}, {named}"] = [made.polished(0, changed)[1]]
    if options.long:
        runs[LONG] = [made.distilled(0, **options.long)[1]]
    publish(options.docs, "polish", runs, settings, options.model, "training")


if __name__ == "__main__":
    main()
