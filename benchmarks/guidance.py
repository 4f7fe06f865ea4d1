"""What a guidance scale makes of the teacher's pictures: python -m benchmarks.guidance [MODEL] [--scales 2 3 4 5] ...

For each scale the teacher and DPM-Solver++ draw the validation captions, by which things are chosen. The table has how
far the teacher's pictures are from the real ones, whether they are taken for their captions, how much seeds differ, and
how near the solver comes with 8 and with 16 network evaluations. A second table has what the adapter in adapters/MODEL
has taken over of the guidance: on states of the teacher's guided runs, its prediction is compared with the teacher's.
What was drawn is kept in --scratch. Writes docs/guidance.json and the tables in docs/guidance.md. Run
`dvc repro distill@MODEL` first.

Example: python -m benchmarks.guidance emoji --scales 2 3 4 5 --steps 25 --pictures 352
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from lcmlora import bases, config
from lcmlora.adapters import lora
from lcmlora.bases import folders
from lcmlora.diffusion import sampling
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.diffusion.teacher import Teacher
from lcmlora.evaluation.image_sets import ImageSets
from lcmlora.evaluation.measures.distances import named
from lcmlora.evaluation.measures.metrics import diversity, retrieval_at_1
from lcmlora.evaluation.sets.captions import choosing, choosing_seeds
from lcmlora.evaluation.sets.drawing import load_features
from lcmlora.io.files import sha256_file, write_json
from lcmlora.io.parsing import as_object, read_json

_STATES = 64  # of which the second table is
_ROWS = 5  # of the second table, about
_SOLVER = "dpm++"
_SOLVER_STEPS = (4, 8)  # guided, so that each takes two evaluations


def measure(
    settings: config.Config, model: str, scales: list[float], steps: int, pictures: int, scratch: Path
) -> dict[str, Any]:
    evaluation = settings.evaluation_for(model)
    captions, seeds = choosing(Path("data/pictures")), choosing_seeds(evaluation.seed)
    base = bases.load(model, settings.base(model), Path("bases", model), device=bases.pick_device("auto"))
    features = load_features(base, evaluation)
    made_of = config.digest(folders.identity(settings.base(model), Path("bases", model)))
    sets = ImageSets(base, features, captions.prompts, pictures, evaluation.batch, 0, scratch, made_of)
    scratch.mkdir(parents=True, exist_ok=True)
    records = captions.records
    real, gallery = sets.real("real pictures", records, settings.data)["features"], [r.caption for r in records]
    distance, rows = named(features.distance), {}
    for scale in scales:
        teacher = SolverSettings.of("ddim", steps, scale)
        drawn, again = (
            sets.draw(f"guidance {scale:g}", teacher, seed).features for seed in (seeds.teacher, seeds.compared)
        )
        floor = distance.between(drawn, again)
        row = {
            "real": distance.between_few(real, drawn),
            "retrieval": retrieval_at_1(drawn, sets.shown, real, gallery),
            "diversity": diversity(drawn, sets.shown, drawn.double().mean(0)),
            "floor": floor,
        }
        for count in _SOLVER_STEPS:
            solver = SolverSettings.of(_SOLVER, count, scale)
            found = sets.draw(f"{_SOLVER}, {count} steps, guidance {scale:g}", solver, seeds.compared).features
            row[f"excess@{solver.evaluations}"] = distance.between(drawn, found) - floor
        rows[f"{scale:g}"] = row
    about = {"model": model, "steps": steps, "pictures": pictures, "captions": len(captions.prompts)}
    return about | {"features": features.name, "seed": seeds.teacher, "real": len(records), "scales": rows}


@torch.no_grad()
def taken_over(settings: config.Config, model: str) -> list[dict[str, float]]:
    """Returns what the adapter has taken over of the guidance, at timesteps of the distillation's grid.

    scale: that the student's prediction has, along the direction in which guidance moves it.
    left: length of what lies between the predictions of student and teacher, as a share of what guidance adds.
    """
    evaluation, distill = settings.evaluation_for(model), settings.distill_for(model)
    base = bases.load(model, settings.base(model), Path("bases", model), device=bases.pick_device("auto"))
    lora.load(base.network, Path("adapters", model, lora.WEIGHTS), base.family.placement)
    prompts, seed = choosing(Path("data/pictures")).prompts, choosing_seeds(evaluation.seed).teacher
    conditioning = sampling.text_conditioning(base, [prompts[i % len(prompts)] for i in range(_STATES)])
    teacher = Teacher(base, sampling.unconditional(base), distill.grid)
    x, w = sampling.initial_noise(base.latent_shape, seed, range(_STATES)), (distill.w_min + distill.w_max) / 2
    found = []
    for row in reversed(range(distill.grid)):
        t, t_prev = (each[row].expand(_STATES) for each in (teacher.t, teacher.t_prev))
        conditional, unconditional = teacher.outputs(x, t, conditioning)
        student = base.predict(x, t, conditioning).flatten(1)
        direction = (conditional - unconditional).flatten(1)
        moved = student - unconditional.flatten(1)
        left = (moved - (w + 1) * direction).norm(dim=1) / (w * direction).norm(dim=1)
        scale = (moved * direction).sum(1) / direction.square().sum(1)
        found.append({"timestep": int(t[0]), "scale": scale.median().item(), "left": left.median().item()})
        x = teacher.step(x, t, t_prev, torch.full((_STATES,), w), conditioning)
    return found


def show(found: dict[str, Any]) -> str:
    keys = [f"excess@{2 * count}" for count in _SOLVER_STEPS]
    scales_head = ["guidance scale", "distance to real pictures", "retrieval@1", "diversity"]
    scales_head += [f"excess of DPM-Solver++ with {key.partition('@')[2]} evaluations" for key in keys]
    rows = [
        [scale, f"{row['real']:.0f}", f"{row['retrieval']:.3f}", f"{row['diversity']:.3f}"]
        + [f"{row[key]:.0f}" for key in keys]
        for scale, row in found["scales"].items()
    ]
    said = (
        f"Model {found['model']}: {found['pictures']} pictures of {found['captions']} validation captions in each set, "
        f"{found['real']} real ones, {found['steps']} DDIM steps, features {found['features']}, seed {found['seed']}."
    )
    learnt = [
        [f"{each['timestep']}", f"{each['scale']:.2f}", f"{each['left']:.2f}"]
        for each in found["taken_over"][:: -max(len(found["taken_over"]) // _ROWS, 1)]  # the lowest timestep first
    ]
    head = [
        "timestep",
        f"scale of the student, {found['distilled']:g} of the teacher",
        "left, as a share of what guidance adds",
    ]
    taken = f"Adapter {found['adapter'][:12]}:\n\n{tables.markdown(head, learnt, words=0)}"
    return f"{said}\n\n{tables.markdown(scales_head, rows)}\n{taken}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5])
    parser.add_argument("--steps", type=int, help="of the teacher; those of params.yaml if left out")
    parser.add_argument("--pictures", type=int, help="of each set; those of params.yaml if left out")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/guidance"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument(
        "--adapter", action="store_true", help="measure only the adapter again; scales stay as they are"
    )
    options = parser.parse_args()
    settings = config.load(Path("params.yaml"))
    evaluation = settings.evaluation_for(options.model)
    steps, pictures = options.steps or evaluation.teacher_steps, options.pictures or evaluation.pictures
    if options.adapter:
        found = as_object(read_json(options.docs / "guidance.json"), "guidance.json")
        if found["model"] != options.model:
            parser.error(f"--adapter: the scales are those of {found['model']}")
    else:
        found = measure(settings, options.model, options.scales, steps, pictures, options.scratch)
    distill = settings.distill_for(options.model)
    found["adapter"] = sha256_file(Path("adapters", options.model, lora.WEIGHTS))
    found |= {"distilled": (distill.w_min + distill.w_max) / 2 + 1, "taken_over": taken_over(settings, options.model)}
    write_json(options.docs / "guidance.json", found)
    tables.write(options.docs / "guidance.md", show(found))
    print(show(found))


if __name__ == "__main__":
    main()
