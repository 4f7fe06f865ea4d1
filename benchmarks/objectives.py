"""The objectives at one budget, over several seeds: python -m benchmarks.objectives [--seeds 3] [--steps 700] ...

Each run distils the model's adapter with its settings in params.yaml but for the objective and the seed, and measures
it as `evaluate` does, on captions that no adapter was trained on: on validation captions, by which an objective is
chosen, and on test captions, on which it is reported. A run that is finished is kept in --scratch and not repeated, so
the command can be stopped and started again. Writes docs/objectives.json and the tables in docs/objectives.md. Run
`dvc repro encode@MODEL reference@MODEL` first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import origins, tables
from benchmarks.choosing import CHOOSING, REPORTING, Judge, best
from lcmlora import bases, config
from lcmlora.bases import folders
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.io.files import write_json
from lcmlora.plugins import OBJECTIVES
from lcmlora.project import Project
from lcmlora.training.loop import NullLogger


def run(settings: config.Config, model: str, changes: dict[str, Any], cache: LatentCache, work: Path) -> dict[str, Any]:
    """Distils with some settings changed, evaluates and returns the figures; if `work` has them already, just these."""
    path = work / "figures.json"
    if path.exists():
        return json.loads(path.read_text())
    values = settings.distill_for(model).model_dump() | changes
    settings_class = config.distill_settings(values["objective"])
    distillation = settings_class.model_validate(
        {key: value for key, value in values.items() if key in settings_class.model_fields}
    )
    device = bases.pick_device(distillation.device)
    folder = Path("bases", model)

    def load() -> bases.LoadedBase:
        dtype = bases.pick_dtype(distillation.precision, device)
        return bases.load(model, settings.base(model), folder, device=device, dtype=dtype)

    identity = folders.identity(settings.base(model), folder)
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    logger = NullLogger()
    made = distill_adapter(load(), cache, distillation, work, work / "adapter", identity=identity, logger=logger)
    assert made is not None
    seconds = time.monotonic() - began
    judge = Judge(
        load,
        settings.data,
        settings.evaluation_for(model),
        Path("data/pictures"),
        Path("reference", model),
        work.parent / f"{model}-choosing",
    )
    found = {"seconds": seconds, "validation": made.validation.plain(), "settings": made.distill}
    found |= judge.figures(work / "adapter", work)
    write_json(path, found)
    return found


def table(runs: dict[str, list[dict[str, Any]]], steps: tuple[int, ...], title: str, captions: str) -> str:
    """Returns a row for each entry: the mean, the lowest and the highest over the seeds.

    Args:
        title: of the first column.
        captions: whose figures, `choosing` or `reporting`.
    """

    def cell(figures: list[dict[str, Any]], name: str, key: str, form: str) -> str:
        values = [f[captions][name][key] for f in figures]
        spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    head = [title, *(f"excess@{n}" for n in steps), *(f"retrieval@{n}" for n in steps)]
    rows = []
    for name, figures in runs.items():
        cells = [cell(figures, "excess", f"student@{n}", ".0f") for n in steps]
        cells += [cell(figures, "retrieval", f"student@{n}", ".3f") for n in steps]
        rows.append([name, *cells])
    return tables.markdown(head, rows)


def report(runs: dict[str, list[dict[str, Any]]], steps: tuple[int, ...], title: str, judged_at: int) -> str:
    """Returns the figures of all entries on validation captions, and those of the best one on test captions.

    Args:
        title: of the first column.
        judged_at: steps at which the best one is chosen, by its mean excess.
    """
    chosen = best(runs, judged_at)
    return "\n".join(
        (
            "On validation captions, to choose by:\n",
            table(runs, steps, title, CHOOSING),
            f"`{chosen}` has the smallest excess at {judged_at} steps. On test captions, to report:\n",
            table({chosen: runs[chosen]}, steps, title, REPORTING),
        )
    )


def publish(
    docs: Path, page: str, runs: dict[str, list[dict[str, Any]]], settings: config.Config, model: str, title: str
) -> None:
    """Prints the tables of the runs, and writes docs/PAGE.json and the tables in docs/PAGE.md.

    Args:
        title: of the tables' first column.
    """
    text = report(runs, settings.evaluation_for(model).student_steps, title, settings.gate.steps)
    print(text)
    measured = origins.of_runs(itertools.chain.from_iterable(runs.values()), Project())
    write_json(docs / f"{page}.json", {"origin": measured.plain(), "runs": runs})
    tables.write(docs / f"{page}.md", text)
    origins.write(Project(), docs, [page])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES.names, default=OBJECTIVES.names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of distillation; those of params.yaml if left out")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/objectives"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()

    settings = config.load(Path("params.yaml"))
    cache = LatentCache(Path("data/latents", options.model))
    runs: dict[str, list[dict[str, Any]]] = {objective: [] for objective in options.objectives}
    for seed, objective in itertools.product(range(options.seeds), options.objectives):
        print(f"{objective}, seed {seed}", flush=True)
        work = options.scratch / f"{options.model}-{objective}-{seed}-{options.steps or 'all'}"
        changes = {"objective": objective, "seed": seed} | ({"steps": options.steps} if options.steps else {})
        runs[objective].append(run(settings, options.model, changes, cache, work))
    publish(options.docs, "objectives", runs, settings, options.model, "objective")


if __name__ == "__main__":
    main()
