"""Pictures against prompts as training data, at equal wall-clock time: python -m benchmarks.sources [--seconds 200] ...

The same captions come with real pictures, and as prompts alone. The time that filling the latent cache takes, by the
VAE or by teacher rollouts, is part of the seconds; the rest is for steps, whose time is measured first, in turns. All
other settings are those of params.yaml. The evaluation is that of `evaluate`, on captions that no run has trained on:
validation captions to choose by, test captions to report on. A finished run is kept in --scratch and not repeated.
Writes docs/sources.json and the tables in docs/sources.md. Run `dvc repro encode@MODEL reference@MODEL` first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import objectives, origins, tables
from lcmlora import bases, config
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.sources.source import read_records, survey, write_records
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.io.files import write_json
from lcmlora.project import Project
from lcmlora.training.loop import take_step

KINDS: dict[str, dict[str, Any]] = {
    "real pictures": {},
    "final": {"trajectory": 0.0},
    "half trajectory": {"trajectory": 0.5},
    "trajectory": {"trajectory": 1.0},
}
PICTURES = "real pictures"


def fill(settings: config.Config, model: str, work: Path, *, pictures: bool) -> tuple[LatentCache, float]:
    """Returns the cache of the training captions, made once, and the seconds that it took."""
    work.mkdir(parents=True, exist_ok=True)
    seconds_file, out = work / "seconds.json", work / "latents"
    if not seconds_file.exists():
        listed = read_records(Path("data/pictures/train.jsonl"))
        data = settings.data
        if pictures:
            write_records(work / "train.jsonl", listed)
        else:
            (work / "prompts.txt").write_text("\n".join(dict.fromkeys(r.caption for r in listed)) + "\n")
            changes = {"source": "prompts", "path": str(work / "prompts.txt")}
            data = type(data).model_validate(data.model_dump() | changes)
            write_records(work / "train.jsonl", survey(data).records)
        device = bases.pick_device("auto")
        base = bases.load(
            model,
            settings.base(model),
            Path("bases", model),
            device=device,
            dtype=bases.pick_dtype("auto", device),
            parts=("vae" if pictures else "network", "text"),
        )
        began = time.monotonic()
        encode_latents(base, data, settings.encode_for(model), work, work / "scratch", out)
        write_json(seconds_file, {"seconds": time.monotonic() - began})
    return LatentCache(out), json.loads(seconds_file.read_text())["seconds"]


def paces(
    settings: config.Config, model: str, caches: dict[str, LatentCache], turns: int
) -> dict[str, dict[str, float]]:
    """Returns for each kind the median seconds of a step, and their ratio to a step on real pictures: the median over
    the turns and the quartiles."""
    steps = {}
    for kind, changes in KINDS.items():
        plain = settings.distill_for(model)
        distillation = type(plain).model_validate(plain.model_dump() | changes)
        device = bases.pick_device(distillation.device)
        base = bases.load(
            model,
            settings.base(model),
            Path("bases", model),
            device=device,
            dtype=bases.pick_dtype(distillation.precision, device),
            parts=("network",),
        )
        optimization, cache = add_adapter(base, distillation), caches[kind]
        distillation_loss = Distillation(base, cache.unconditional(), distillation)
        steps[kind] = (
            distillation_loss,
            optimization,
            sample_stream(cache, torch.arange(len(cache)), distillation, device),
            distillation,
        )
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 1):
        for kind, parts in steps.items():
            began = time.perf_counter()
            for step in range(4 * turn, 4 * turn + 4):
                _, norm = take_step(*parts, step)
            norm.item()
            if turn:  # the first one warms up
                taken[kind].append((time.perf_counter() - began) / 4)
    found = {}
    for kind, seconds in taken.items():
        ratios = [own / on_pictures for own, on_pictures in zip(seconds, taken[PICTURES], strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        found[kind] = {"seconds": statistics.median(seconds), "ratio": median, "lower": lower, "upper": upper}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--seconds", type=float, default=200.0, help="of filling the cache and distilling")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=60, help="in which the steps are timed")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/sources"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()

    settings, model = config.load(Path("params.yaml")), options.model
    base = settings.base(model)
    evaluation = base.evaluation | {"student_steps": [1, 2, 4, 8], "resamples": 0, "latency_repeats": 1}
    rollouts = settings.encode_for(model).rollouts.model_copy(update={"states": True})
    changed = base.model_copy(
        update={"encode": base.encode | {"rollouts": rollouts.model_dump()}, "evaluation": evaluation}
    )
    settings = settings.model_copy(update={"bases": settings.bases | {model: changed}})
    real = fill(settings, model, options.scratch / f"{model}-pictures", pictures=True)
    drawn = fill(settings, model, options.scratch / f"{model}-prompts", pictures=False)
    filled = {kind: real if kind == PICTURES else drawn for kind in KINDS}
    known = options.scratch / f"{model}-paces.json"
    if not known.exists():
        write_json(known, paces(settings, model, {kind: cache for kind, (cache, _) in filled.items()}, options.turns))
    pace = json.loads(known.read_text())
    steps = {kind: int((options.seconds - filled[kind][1]) / pace[kind]["seconds"]) for kind in KINDS}
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed, kind in itertools.product(range(options.seeds), KINDS):
        print(f"{kind}, seed {seed}: {steps[kind]} steps", flush=True)
        work = options.scratch / f"{model}-{kind.replace(' ', '-')}-{seed}-{options.seconds:g}"
        each = KINDS[kind] | {"seed": seed, "steps": steps[kind], "validate_every": steps[kind]}
        runs[kind].append(objectives.run(settings, model, each, filled[kind][0], work))
    text = tables.markdown(
        ["learned from", "latents", "filled in", "a step, of one on pictures", "steps", "seconds in all"],
        [
            [
                kind,
                str(len(filled[kind][0])),
                f"{filled[kind][1]:.0f} s",
                f"{pace[kind]['ratio']:.2f} ({pace[kind]['lower']:.2f} to {pace[kind]['upper']:.2f})",
                str(steps[kind]),
                f"{filled[kind][1] + statistics.mean(run['seconds'] for run in runs[kind]):.0f}",
            ]
            for kind in KINDS
        ],
    )
    text += "\n" + objectives.report(runs, (1, 2, 4, 8), "learned from", settings.gate.steps)
    print(text)
    measured = origins.of_runs(itertools.chain.from_iterable(runs.values()), Project())
    facts = {
        "origin": measured.plain(),
        "seconds": options.seconds,
        "paces": pace,
        "filled": {kind: filled[kind][1] for kind in KINDS},
        "latents": {kind: len(filled[kind][0]) for kind in KINDS},
        "runs": runs,
    }
    write_json(options.docs / "sources.json", facts)
    tables.write(options.docs / "sources.md", text)
    origins.write(Project(), options.docs, ["sources"])


if __name__ == "__main__":
    main()
