"""What runs on which GPU, as docs/hardware.md has it: python -m benchmarks.hardware

For the published bases and GPUs of several sizes it counts what `lcmlora doctor BASE --gpu-gb N` counts: the settings
that fit, hours, disk. Of the emoji base it measures some steps on this machine, beside what is counted for them. It
takes some minutes on one core, and writes docs/hardware.json and the tables of docs/hardware.md.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.memory import most_allocated
from lcmlora import bases, config
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.doctor import gpus, measuring
from lcmlora.doctor.forecast import MAY_FIT, TOO_LARGE, forecast, outside_projects
from lcmlora.doctor.random_latents import random_cache
from lcmlora.doctor.tables import hours_text
from lcmlora.doctor.workload import MetaBase
from lcmlora.io.files import write_json
from lcmlora.io.parsing import JsonObject, read_json
from lcmlora.project import Project
from lcmlora.training.batches import split_rows
from lcmlora.training.execution import pick_checkpointing
from lcmlora.training.loop import take_step

PAGE, FIGURES = Path("docs/hardware.md"), Path("docs/hardware.json")
PUBLISHED = ("sd15", "sd21", "sdxl", "ssd1b")
# A GPU of each size, whose rate the hours are for; of the smallest size none is listed.
SIZES = {8: None, 12: "RTX 4070 Ti", 16: "RTX 4080", 24: "RTX 4090", 48: "L40S", 80: "H100"}
_STAGES = ("encode", "reference", "distill", "evaluate")
COUNTED, MEASURED = "c", "m"


def count() -> list[JsonObject]:
    """Returns a row for each published base and each size of memory."""
    rows = []
    for base in PUBLISHED:
        name, settings = outside_projects(base)
        counted = MetaBase(name, settings.base(name), Path(settings.base(name).source))
        for memory, gpu in SIZES.items():
            named = [gpus.named(gpu)] if gpu else []
            found = forecast(settings, name, None, named, float(memory), counted=counted)
            hours = {stage.stage: named[0].hours(stage.operations) if named else None for stage in found.stages}
            in_all = named[0].hours(found.operations) if named else None
            facts = {"base": name, "memory": memory, "gpu": gpu, "hours": hours | {"in all": in_all}}
            stages = {stage.stage: asdict(stage) | {"needed": stage.needed} for stage in found.stages}
            rows.append(facts | {"stages": stages, "disk": sum(found.disk.values()), "pictures": found.pictures})
            print(name, memory, {stage.stage: stage.verdict for stage in found.stages}, flush=True)
    return rows


def measure() -> JsonObject:
    """Returns what a step of the emoji base takes on this machine, and what is counted for it."""
    project = Project()
    settings = project.settings()
    distill, entry = settings.distill_for("emoji"), settings.base("emoji")
    distill = distill.model_copy(update={"trajectory": 0.0, "rollout": 0.0})
    device = bases.pick_device(distill.device)
    dtype = bases.pick_dtype(distill.precision, device)
    folder = project.base("emoji")
    rows = distill.batch // distill.accumulate
    mode = pick_checkpointing(distill.checkpointing, device)
    measured = _peak(entry, folder, distill)  # before anything else is in memory
    counted = MetaBase("emoji", entry, folder).step(distill, rows, dtype, checkpointing=mode)
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as scratch:
        estimate = measuring.estimate_without_cache(
            "emoji", entry, folder, distill, config.Launch(), Path(scratch), Path(work)
        )
    return {
        "device": estimate.device,
        "batch": distill.batch,
        "checkpointing": mode,
        "precision": estimate.precision,
        "counted_bytes": counted.peak,
        "measured_bytes": measured,
        "operations": counted.operations / rows * distill.batch,
        "seconds": estimate.trials[0].seconds,
        "hours": estimate.total / 3600,
    }


def _peak(entry: config.Base, folder: Path, settings: config.Distill) -> int:
    """Returns the bytes of tensors at the peak of a step, as torch's allocator gives them out."""
    device = bases.pick_device(settings.device)
    base = bases.load("emoji", entry, folder, device=device)
    with tempfile.TemporaryDirectory() as work:
        cache = random_cache(base, 10 * settings.batch, Path(work))
        base.text_encoders = []
        gc.collect()
        optimization = add_adapter(base, settings)
        distillation = Distillation(base, cache.unconditional(), settings)
        batches = sample_stream(cache, split_rows(cache, settings)[0], settings, device)
        take_step(distillation, optimization, batches, settings, 0)
        return most_allocated(lambda: take_step(distillation, optimization, batches, settings, 1))


def show(found: dict[str, Any]) -> str:
    """Returns the tables of docs/hardware.md."""
    head = ["base", "memory, GB", "distill", "evaluation.batch", "takes, GB", "GPU", "distill, h", "all, h", "disk, GB"]
    rows = []
    for row in found["counted"]:
        stages = row["stages"]
        distill, evaluate = stages["distill"], stages["evaluate"]
        settings = distill["settings"]
        fits = not any(stages[name]["verdict"] == TOO_LARGE for name in _STAGES)
        least, most = (max(stages[name]["needed"][end] for name in _STAGES) / 1e9 for end in (0, 1))
        chosen = f"accumulate {settings['distill.accumulate']}, {settings['distill.checkpointing']}"
        hours = (hours_text(row["hours"][name]) for name in ("distill", "in all"))
        if any(stages[name]["verdict"] == MAY_FIT for name in _STAGES):
            chosen += ", may fit"
        cells = [chosen, f"{evaluate['settings']['evaluation.batch']}"] if fits else ["does not fit", ""]
        cells += [f"{least:.1f} to {most:.1f}", row["gpu"] or "", *(hours if fits and row["gpu"] else ("", ""))]
        marked = [f"{cell} {COUNTED}" if cell else "" for cell in (*cells, f"{row['disk'] / 1e9:.0f}")]
        marked[3] = cells[3]
        rows.append([row["base"], f"{row['memory']}", *marked])
    m = found["measured"]
    peaks = (f"{m['counted_bytes'] / 1e6:.0f} {COUNTED}", f"{m['measured_bytes'] / 1e6:.0f} {MEASURED}")
    own = [
        ["tensors at the peak of a step, MB", *peaks],
        ["operations of a step, TFLOP", f"{m['operations'] / 1e12:.4f} {COUNTED}", ""],
        ["seconds of a step", "", f"{m['seconds']:.2f} {MEASURED}"],
        ["hours of the distillation", "", f"{m['hours']:.2f} {MEASURED}"],
    ]
    return (
        tables.markdown(head, rows, words=3)
        + f"\nThe emoji base, batch {m['batch']}, {m['precision']}, checkpointing {m['checkpointing']}, "
        + f"{m['device']}:\n\n"
        + tables.markdown(["", "counted", "measured"], own)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure anew, and keep what was counted")
    kept = read_json(FIGURES)["counted"] if parser.parse_args().measure else None
    found = {"measured": measure(), "counted": kept or count()}
    write_json(FIGURES, found)
    tables.write(PAGE, show(read_json(FIGURES)))


if __name__ == "__main__":
    main()
