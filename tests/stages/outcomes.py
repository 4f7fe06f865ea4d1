"""What each stage makes of fixed inputs in miniature, as figures that any processor gives, but for rounding.

Weights, latents and features are told by their shape and by three figures of O(1) over all their numbers; what is made
of integers and text, as it is.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.config import Compatibility, Data, Encode, Rollouts
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.prepare import PARTS, prepare_pictures
from lcmlora.data.sources.source import Record, write_records
from lcmlora.distillation.distill import distill_adapter
from lcmlora.distillation.finetune import train_variation
from lcmlora.distillation.polish import polish_adapter
from lcmlora.evaluation.comparisons.judging import TeacherJudge
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.measures import features
from lcmlora.evaluation.reference import draw_reference
from lcmlora.evaluation.study import draw_alone, run_study
from lcmlora.inference import compatibility
from lcmlora.io.documents import Document
from lcmlora.project import Project
from lcmlora.releases.package import package_release
from lcmlora.settings.training import Polish
from lcmlora.training.loop import NullLogger
from tests.data.conftest import add, data_in, picture
from tests.demo.test_pretrain import MODULES, TINY
from tests.distillation.test_finetune import STYLE, WHOLE
from tests.evaluation.conftest import made_of
from tests.stages.inputs import EVALUATION, STUDY, Inputs
from tests.support.distillation import SETTINGS
from tests.support.releases import load_settings, write_stages

Outcome = dict[str, Any]

# What the machine, the day and the installed versions decide.
_PASSING = (
    "adapter", "base", "digest", "git", "latency", "model", "packaged", "reference_digest", "seconds",
    "seconds_per_picture", "sha256", "unet", "versions",
)  # fmt: skip


def tell(values: Tensor) -> Outcome:
    """Returns figures that change where any of the numbers does, each by as much as the numbers, whatever their size.

    That is the logarithm of their root mean square, and in units of this their mean and two sums with random signs.
    """
    flat = values.double().flatten()
    size = float(flat.square().mean().sqrt()) or 1.0
    signs = torch.randint(0, 2, (2, len(flat)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    sums = [float((row * flat).sum()) / (size * len(flat) ** 0.5) for row in signs]
    return {"shape": list(values.shape), "log_size": math.log(size), "mean": float(flat.mean()) / size, "sums": sums}


def tell_all(tensors: dict[str, Tensor]) -> Outcome:
    return {name: tell(tensors[name]) for name in sorted(tensors)}


def tell_weights(tensors: dict[str, Tensor]) -> Outcome:
    """Returns the figures of all weights together."""
    return tell(torch.cat([tensors[name].flatten().float() for name in sorted(tensors)]))


def plain(facts: Any) -> Any:
    """Returns facts without what passes."""
    if isinstance(facts, Document):
        facts = facts.plain()
    if isinstance(facts, dict):
        return {str(key): plain(value) for key, value in facts.items() if key not in _PASSING}
    return [plain(value) for value in facts] if isinstance(facts, list | tuple) else facts


def read(path: Path) -> Any:
    return plain(json.loads(path.read_text()))


def of_pretrain(inputs: Inputs, work: Path) -> Outcome:
    from lcmlora.demo import pretrain

    settings = TINY.model_copy(update={"lr": 1e-2, "vae_lr": 1e-2, "vae_styles": ("noto",), "vae_groups": TINY.groups})
    base = work / "base"
    pretrain.pretrain_base(settings, MODULES, work / "scratch", base, torch.device("cpu"))
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    found = {
        part: tell_weights(load_file(work / "base" / part / f"{name}.safetensors")) for part, name in parts.items()
    }
    scheduler = json.loads((base / "scheduler/scheduler_config.json").read_text())
    return found | {
        "schedule": {key: scheduler[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")},
        "vocabulary": len(json.loads((base / "tokenizer/vocab.json").read_text())),
    }


def of_prepare(inputs: Inputs, work: Path) -> Outcome:
    sources = {
        "folder": _folder(work / "folder"),
        "webdataset": _tar(work / "tars"),
        "parquet": _table(work / "tables"),
        "prompts": _prompts(work / "prompts.txt"),
        "emoji": data_in(
            MODULES.parent / "package-lock.json", source="emoji", styles=("noto",), groups=("food-drink",), copies=1
        ),
    }
    return {name: _prepared(data, work / "prepared" / name) for name, data in sources.items()}


def _prepared(data: Data, out: Path) -> Outcome:
    prepare_pictures(data, 1, out)
    report = read(out / "report.json")
    for part in PARTS:
        rows = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
        keys = ("key", "caption", "width", "height", "look", "raw_caption", "note")
        report[f"{part} list"] = [[row.get(key) for key in keys] for row in rows[:24]]
    return report


def _folder(folder: Path) -> Data:
    for number in range(6):
        add(folder, f"{number}.png", f"subject {number}", picture(number), compress_level=0)
    add(folder, "again.png", "again", picture(0), compress_level=0)
    add(folder, "like.png", "alike", picture(0, (64, 64)), compress_level=0)
    add(folder, "small.png", "small", picture(9, (8, 8)), compress_level=0)
    add(folder, "long.png", "long", picture(9, (96, 32)), compress_level=0)
    add(folder, "tags.png", "<b>a  cat</b>,\n&amp; a DOG\n", picture(10), compress_level=0)
    add(folder, "transparent.png", "transparent", Image.new("RGBA", (32, 24), (255, 0, 0, 0)), compress_level=0)
    add(folder, "damaged.png", "damaged", b"\x89PNG\r\n")
    add(folder, "test/other.png", "of another part", picture(11), compress_level=0)
    add(folder, "silent.png", None, picture(12), compress_level=0)
    return data_in(folder, near_duplicates=2)


def _png(number: int) -> bytes:
    content = io.BytesIO()
    picture(number).save(content, "PNG", compress_level=0)
    return content.getvalue()


def _tar(folder: Path) -> Data:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(4):
            for ending, content in (("png", _png(number)), ("txt", f"subject {number}".encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return data_in(folder, source="webdataset")


def _table(folder: Path) -> Data:
    folder.mkdir()
    pictures = [{"bytes": _png(number), "path": None} for number in range(4)]
    table = pyarrow.table({"image": pictures, "text": [f"subject {number}" for number in range(4)]})
    pyarrow.parquet.write_table(table, folder / "part.parquet")
    return data_in(folder, source="parquet")


def _prompts(path: Path) -> Data:
    path.write_text("a red apple\n\na green tree \na tree\na red apple\nfruit\n")
    return data_in(path, source="prompts", copies=2)


def of_encode(inputs: Inputs, work: Path) -> Outcome:
    def cached(name: str, base: Any, data: Data, settings: Encode, pictures: Path) -> Outcome:
        encode_latents(base, data, settings, pictures, work / "scratch", work / name)
        cache = LatentCache(work / name)
        figures = {
            "pictures": len(cache),
            "latent_shape": list(cache.latent_shape),
            "files": sorted(path.name for path in (work / name).iterdir()),
        }
        for path in sorted((work / name).glob("*.safetensors")):
            figures[path.stem] = tell_all({key: value for key, value in load_file(path).items() if key != "key"})
        return figures

    pictures = work / "pictures"
    pictures.mkdir()
    lines = (inputs.pictures / "train.jsonl").read_text().splitlines(keepends=True)
    (pictures / "train.jsonl").write_text("".join(lines[:8]))
    encoders = inputs.load("vae", "text")
    found = {
        "square": cached("square", encoders, inputs.data, Encode(batch=4), pictures),
        "shapes": cached(
            "shapes", encoders, inputs.data, Encode(batch=4, aspect_buckets=True, bucket_pictures=2), pictures
        ),
    }
    (work / "prompts").mkdir()
    prompts = [Record(f"{n}/0", f"a tree {n}", f"{n:064x}", 0, 0) for n in range(2)]
    write_records(work / "prompts" / "train.jsonl", prompts)
    drawn = Encode(batch=2, rollouts=Rollouts(steps=4, w=4.0, states=True))
    data = inputs.data.model_copy(update={"source": "prompts"})
    return found | {"rollouts": cached("rollouts", inputs.load("network", "text"), data, drawn, work / "prompts")}


def of_reference(inputs: Inputs, work: Path) -> Outcome:
    base = inputs.load()
    facts = draw_reference(base, inputs.data, EVALUATION, inputs.pictures, work / "scratch", work / "out", work)
    return {"facts": plain(facts), "sets": tell_all(_spread(work / "out")), "features": _features()}


def of_distill(inputs: Inputs, work: Path) -> Outcome:
    found = {}
    for objective in ("lcm", "tcd", "pcm", "tdd"):
        changes = {"objective": objective, "steps": 3, "empty_prompts": 0.1, "grid": 10, "ema": 0.5}
        settings = SETTINGS.model_copy(update=changes)
        scratch, out = work / f"{objective}-scratch", work / objective
        scratch.mkdir()
        cache, logger = LatentCache(inputs.latents), _Losses()
        base = inputs.load("network")
        made = distill_adapter(base, cache, settings, scratch, out, identity={}, logger=logger)
        assert made is not None
        found[objective] = {
            "losses": logger.losses,
            "sampler": made.sampler.plain(),
            "weights": tell_weights(load_file(out / lora.WEIGHTS)),
        }
    return found


def of_polish(inputs: Inputs, work: Path) -> Outcome:
    polish = Polish(steps=3, lr=1e-3, fake_lr=1e-3, fake_updates=2, head_start=1, student_steps=(1, 2))
    settings = SETTINGS.model_copy(update={"polish": polish, "objective": "tcd", "grid": 10, "validate_every": 2})
    distilled, scratch, out = work / "distilled", work / "scratch", work / "out"
    scratch.mkdir()
    cache, logger = LatentCache(inputs.latents), _Losses()
    distill_adapter(inputs.load("network"), cache, settings, scratch, distilled, identity={}, logger=logger)
    base, work = inputs.load(), work / "polish"
    work.mkdir()
    judge = TeacherJudge.of(base, EVALUATION, inputs.pictures, (1, 2), work)
    losses = _Losses()
    made = polish_adapter(base, cache, settings, distilled, work, out, identity={}, logger=losses, judge=judge)
    assert made is not None
    assert made.polish is not None
    return {
        "losses": losses.losses,
        "validation": {"loss": made.polish.distances, "best_step": made.polish.best_step},
        "weights": tell_weights(load_file(out / lora.WEIGHTS)),
    }


def of_evaluate(inputs: Inputs, work: Path) -> Outcome:
    metrics = evaluate_student(
        inputs.load(),
        inputs.adapter,
        inputs.data,
        EVALUATION,
        inputs.pictures,
        inputs.reference,
        work / "scratch",
        work / "out",
        work / "metrics.json",
        work / "steps.csv",
        work / "timings",
    )
    sizes = {path.name: list(Image.open(path).size) for path in sorted((work / "out").glob("*.png"))}
    return {
        "metrics": plain(metrics),
        "sets": tell_all(_spread(work / "out")),
        "pictures": sizes,
        "features": _features(),
    }


def of_style(inputs: Inputs, work: Path) -> Outcome:
    facts = _tuned(inputs, work, STYLE)
    return facts | {"weights": tell_weights(load_file(work / "out" / lora.WEIGHTS))}


def of_finetune(inputs: Inputs, work: Path) -> Outcome:
    facts = _tuned(inputs, work, WHOLE)
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(inputs.base / name), load_file(work / "out" / name)
    return facts | {"changes": tell_weights({key: after[key] - before[key] for key in before})}


def _tuned(inputs: Inputs, work: Path, settings: Any) -> Outcome:
    (work / "scratch").mkdir()
    cache, logger = LatentCache(inputs.latents), _Losses()
    train_variation(inputs.load("network"), cache, settings, work / "scratch", work / "out", identity={}, logger=logger)
    return {"losses": logger.losses}


def of_alone(inputs: Inputs, work: Path) -> Outcome:
    each = inputs.variations[0]  # a style; a checkpoint differs by the folder that is loaded
    parts = (each.kind, each.folder, inputs.data, STUDY, EVALUATION, work / "scratch", work / "out")
    facts = draw_alone(inputs.load(), *parts)
    return {"facts": plain(facts), "sets": tell_all(_spread(work / "out")), "features": _features()}


def of_study(inputs: Inputs, work: Path) -> Outcome:
    (work / "scratch").mkdir()
    figures = run_study(
        lambda folder: inputs.load(folder=folder),
        inputs.adapter,
        inputs.variations,
        STUDY,
        EVALUATION,
        inputs.reference,
        work / "scratch",
        work / "out",
    )
    return {"figures": plain(figures), "features": _features()}


def of_compatibility(inputs: Inputs, work: Path) -> Outcome:
    write_stages(inputs.load(), work)  # an adapter with its scheduler
    settings = Compatibility(
        models=("mini",),
        steps=(2, 4),
        pictures=24,
        loras={"ink": {"source": "ink", "weights": (0.5,)}},
        img2img=(0.5,),
        inpainting=True,
    )
    reading = compatibility.Inputs(
        model="mini",
        base=made_of(inputs.base),
        base_folder=inputs.base,
        adapter=Project(work).adapter("mini"),
        data=inputs.data,
        pictures=inputs.pictures,
        evaluation=EVALUATION,
        settings=settings,
        root=inputs.root,
    )
    (work / "scratch").mkdir()
    figures = compatibility.try_additions(reading, work / "scratch", work / "out.json").plain()
    for where in (figures, *(tried["added"] for tried in figures["tried"].values())):
        for digest in {"adapter", "base", "sha256"} & where.keys():
            del where[digest]  # of files with versions of libraries in their headers
    return {"figures": plain(figures), "features": _features()}


def of_package(inputs: Inputs, work: Path) -> Outcome:
    base = inputs.load()
    write_stages(base, work)
    provenance = package_release("mini", load_settings(inputs.base), Project(work), inputs.base).plain()
    release = work / "release/mini"
    weights = {path.name: load_file(path) for path in sorted(release.glob("*.safetensors"))}
    steady = {key: provenance[key] for key in ("resolution", "sampler", "gate", "seed")}
    return {
        "files": sorted(path.name for path in release.iterdir()),
        "weights": {name: tell_weights(tensors) for name, tensors in weights.items()},
        "tensors": {name: sorted(tensors)[:8] for name, tensors in weights.items()},
        "provenance": {"keys": sorted(provenance)} | plain(steady),
        "card": _steady((release / "README.md").read_text(), inputs, work),
        "report": _steady(_text(release / "report.html"), inputs, work),
    }


OUTCOMES: dict[str, Callable[[Inputs, Path], Outcome]] = {
    "pretrain": of_pretrain,
    "prepare": of_prepare,
    "encode": of_encode,
    "reference": of_reference,
    "distill": of_distill,
    "polish": of_polish,
    "evaluate": of_evaluate,
    "style": of_style,
    "finetune": of_finetune,
    "alone": of_alone,
    "study": of_study,
    "compatibility": of_compatibility,
    "package": of_package,
}


class _Losses(NullLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.losses += [value for name, value in metrics.items() if name in ("loss", "validation_loss")]


def _spread(folder: Path) -> dict[str, Tensor]:
    """Returns each set's features (N, D) less their mean, which is far larger than what tells pictures apart."""
    sets = {name: value.float() for name, value in load_file(folder / "features.safetensors").items()}
    return {name: value - value.mean(0) for name, value in sets.items()}


def _features() -> Outcome:
    """Returns what the emoji base's features say of four pictures."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(4, 3, 16, 16, generator=generator)
    return tell(features.load("efficientnet-lite0", torch.device("cpu"))(pictures))


class _Words(HTMLParser):
    """The text of a page, without styles and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.found.append(" ".join(data.split()))


def _text(page: Path) -> str:
    words = _Words()
    words.feed(page.read_text())
    return "\n".join(words.found)


def _steady(text: str, inputs: Inputs, work: Path) -> list[str]:
    """Returns the lines of a text without digests, times, versions and folders."""
    for folder in (work, inputs.base):
        text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"[0-9a-f]{12,}", "DIGEST", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?Z?", "TIME", text)
    text = re.sub(r"\b\d+\.\d+\.\d+\S*", "VERSION", text)
    text = re.sub(r"\b\d(\.\d+)?e[-+]\d+", "ERROR", text)
    return [line for line in text.splitlines() if line.strip()]
