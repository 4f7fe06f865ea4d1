"""The costs of the presets of params.yaml, by arithmetic: bytes, operations, GPU hours. Part of benchmarks.scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from lcmlora import config
from lcmlora.bases import description

PRESETS = ("sd15", "sd21", "sdxl", "ssd1b")
PICTURES = (10_000, 1_000_000, 12_000_000, 100_000_000)
# Assumptions: operations/s of a GPU in training, a quarter of an H100's dense bf16 peak (989e12 by its data sheet), and
# bytes/s read from a disk or network file system.
TERAFLOPS = 250e12
DISK = 1e9

NIGHT = 8  # hours for making all models again

_BASES = (1, 10, 100)
_COPIES = 3  # of the weights that DVC keeps: adapters/MODEL, and two formats in release/MODEL
_RELEASED = 2 * 2  # formats, in MLflow and in the bucket
_REQUESTS = 28  # to S3 of `publish` and `point a channel`, as the last table has it
_TASKS = 14  # task runs of a model that is made anew: five stages, and nine of tasks/models.py and tasks/dvc.py
_LINE = 159  # bytes of a picture in data/pictures/train.jsonl of the emoji
_SHARD = 256 * 2**20  # bytes, by default (encode.shard_mb)


@dataclass(frozen=True)
class Preset:
    """What a base of params.yaml costs. Operations are multiplications and additions, each counted."""

    name: str
    resolution: int
    latent: int  # bytes of a picture in the cache
    text: int  # bytes of a distinct caption
    vae: float  # operations to encode a picture
    forward: float  # operations of the bare UNet, F0
    step: float  # operations of a distillation step, for one picture
    distill: float  # operations of all steps
    reference: float  # operations to choose the solvers' settings and draw the sets, at most and without decoding
    evaluate: float  # likewise the student's
    adapter: int  # bytes, in 16 bits


def count(name: str, settings: config.Config) -> Preset:
    """Counts the operations on torch's meta device, from the architecture alone."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from lcmlora.adapters import lora
    from lcmlora.data.latents.encode import ROW_BYTES

    base, distill, evaluation = settings.base(name), settings.distill_for(name), settings.evaluation_for(name)
    side = base.resolution // 8
    architecture = description.network_config(base, Path("bases", name))
    width = architecture.integer("cross_attention_dim", 1280)
    pooled = 1280 if "addition_embed_type" in architecture else 0

    def operations(run: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architecture).requires_grad_(False)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        inputs = (torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, width))

        def predict() -> Any:
            return unet(*inputs, added_cond_kwargs=added if pooled else None).sample

        encoding = operations(lambda: vae.encode(torch.empty(1, 3, base.resolution, base.resolution)))
        bare = operations(predict)
        parameters = lora.inject(unet, distill.rank, distill.alpha, seed=0)
        adapted = operations(predict)
        learning = operations(lambda: predict().sum().backward())
    step = 2 * bare + adapted + learning  # the teacher is guided; the target has no gradient
    drawn = _drawn(evaluation)
    student = sum(evaluation.student_steps)
    return Preset(
        name=name,
        resolution=base.resolution,
        latent=2 * 2 * 4 * side * side + ROW_BYTES,
        text=2 * (77 * width + pooled),
        vae=encoding,
        forward=bare,
        step=step,
        distill=step * distill.batch * distill.steps,
        reference=bare * drawn,
        evaluate=adapted * student * evaluation.pictures,
        adapter=2 * sum(p.numel() for p in parameters.values()),
    )


def _drawn(evaluation: config.Evaluation) -> int:
    """Returns how many network evaluations of single pictures a reference takes at most."""
    from lcmlora.evaluation.sets.solver_search import most_evaluations

    teacher = 2 * 2 * evaluation.teacher_steps  # two sets, guided
    solvers = len(evaluation.solvers) * sum(evaluation.solver_evaluations)
    return most_evaluations(evaluation) + (teacher + solvers) * evaluation.pictures


def measure() -> dict[str, Any]:
    settings = config.load(Path("params.yaml"))
    return {name: asdict(count(name, settings)) for name in PRESETS}


def _hours(operations: float) -> float:
    return operations / TERAFLOPS / 3600


def show(found: dict[str, Any]) -> str:
    presets = [Preset(**found[name]) for name in PRESETS]
    rows = [
        [
            f"{p.name}, {p.resolution} px",
            f"{p.latent / 1e3:.1f}",
            f"{p.text / 1e3:.0f}",
            f"{2e9 / p.text:,.0f}",
            f"{p.vae / 1e12:.1f}",
            f"{p.forward / 1e12:.2f}",
            f"{p.step / 1e12:.1f}",
            *(f"{_hours(each):.2f}" for each in (p.distill, p.reference, p.evaluate)),
            f"{p.adapter / 1e6:.0f}",
        ]
        for p in presets
    ]
    head = ["", "latent, KB", "caption, KB", "captions in 2 GB", "VAE, TFLOP", "F0, TFLOP", "step, TFLOP"]
    head += ["distill, GPU h", "reference, GPU h", "evaluate, GPU h", "adapter, MB"]
    bases = tables.markdown(head, rows)
    rows = []
    for pictures in PICTURES:
        for p in (presets[0], presets[2]):
            size = pictures * p.latent
            shards = -(-pictures // (_SHARD // p.latent))
            cells = [f"{pictures:,}", p.name, f"{size / 1e9:,.1f}", f"{shards:,}", f"{_hours(pictures * p.vae):,.2f}"]
            cells += [f"{pictures * _LINE / 1e6:,.0f}", f"{size / DISK / 3600:,.2f}", f"{2 * shards + 3:,}"]
            rows.append([*cells, f"{_hours(pictures * p.step):,.1f}"])
    head = ["pictures", "base", "cache, GB", "shards", "encode, GPU h", "list, MB", "one read, h", "DVC objects"]
    data = tables.markdown([*head, "one epoch, GPU h"], rows, words=2)
    dear = presets[2]
    rows = []
    for bases_count in _BASES:
        first, later = dear.reference + dear.distill + dear.evaluate, dear.distill + dear.evaluate
        hours = _hours(bases_count * later)
        cells = [f"{bases_count}", f"{_hours(bases_count * first):,.1f}", f"{hours:,.1f}", f"{-(-hours // NIGHT):.0f}"]
        cells += [f"{bases_count * copies * dear.adapter / 1e9:,.1f}" for copies in (_COPIES, _RELEASED)]
        rows.append([*cells, f"{bases_count * _REQUESTS:,}", f"{bases_count * _TASKS:,}"])
    head = ["bases", "first, GPU h", "later, GPU h", f"GPUs for {NIGHT} h", "DVC, GB", "MLflow and bucket, GB"]
    many = tables.markdown([*head, "S3 requests", "task runs"], rows)
    return (
        "A base of params.yaml: a picture and a distinct caption in its cache, operations for a picture, and what its "
        f"stages take.\n\n{bases}\n"
        f"A data set, at {_LINE} bytes a picture in the list of `prepare`.\n\n{data}\n"
        f"Many bases like {dear.name}, made anew once; the first time with their references, and without `encode`.\n\n"
        f"{many}"
    )
