"""What the stages are given in miniature: the same in every test, whatever the stages before them do now.

Pictures, adapters and checkpoints are made on the spot, of numbers. Latents, a reference and sets drawn alone are files
that the stages wrote once; where their layout changes, they are written again:

python -m tests.stages.inputs
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcmlora import bases
from lcmlora.bases import folders
from lcmlora.config import Base, Data, Encode, Evaluation, Study
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.sources.source import Record, write_records
from lcmlora.evaluation.reference import draw_reference
from lcmlora.evaluation.study import Variation, draw_alone
from lcmlora.io.files import sha256_file
from lcmlora.plugins import FEATURES
from tests.evaluation.conftest import WORDS, Halves, Quarters, made_of, settings, write_adapter
from tests.support.miniature import save_base

KEPT = Path(__file__).with_name("inputs")
FEATURES.register("quarters", Quarters)  # of twelve dimensions, which need few pictures
FEATURES.register("halves", Halves)
EVALUATION: Evaluation = settings(
    solvers=("ddim", "dpm++", "unipc", "euler"),
    guidance_scales=(1.0, 4.0),
    choosing_pictures=8,
    resamples=8,
    latency_repeats=1,
)
CHOSEN_BY = ("red tree", "fruit apple")  # captions for validation
STUDY = Study(
    models=("mini",),
    styles=("ink",),
    finetunes=("clay",),
    pictures=20,
    weights=(0.8, 1.0),
    solver_steps=(1, 2),
    student_steps=(2, 4),
    steps=4,
    guidance_scales=(2.0,),
    grid_style_weights=(0.8,),
    grid_adapter_weights=(0.5, 1.0),
)


@dataclass(frozen=True)
class Inputs:
    """A folder with a miniature base and all that its stages read."""

    root: Path
    base: Path

    @property
    def data(self) -> Data:
        return Data(source="folder", path=str(self.root / "in"), min_side=8, max_aspect=2.0, validation=0.2, test=0.4)

    @property
    def pictures(self) -> Path:
        """What `prepare` might have written: twelve pictures of each of ten captions.

        Four of the captions are for test and two for validation.
        """
        return self.root / "pictures"

    @property
    def latents(self) -> Path:
        return KEPT / "latents"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def variations(self) -> list[Variation]:
        style, checkpoint = self.root / "ink", self.root / "clay"
        return [
            Variation("style", "ink", style, KEPT / "alone-ink"),
            Variation("finetune", "clay", checkpoint, KEPT / "alone-clay"),
        ]

    def load(self, *parts: str, folder: Path | None = None) -> bases.LoadedBase:
        """Returns the base, or a checkpoint, bare; all its parts by default."""
        made: Base = made_of(self.base)
        where = folder or self.base
        return bases.load("mini", made, where, device=torch.device("cpu"), **({"parts": parts} if parts else {}))


def make(root: Path, base: Path, *, anew: bool = False) -> Inputs:
    """Writes the inputs below `root`.

    Args:
        anew: without those that are kept, which are about to be written.
    """
    inputs = Inputs(root, base)
    _write_pictures(inputs)
    write_adapter(base, inputs.adapter)
    write_adapter(base, root / "ink", seed=7)
    _write_checkpoint(base, root / "clay")
    if not anew:
        shutil.copytree(KEPT / "reference", inputs.reference)
        facts = json.loads((inputs.reference / "reference.json").read_text())
        # The miniature's weights are the same everywhere; the versions in its files' names are not.
        identity = folders.identity(made_of(base), base)
        facts["base"] |= {"digest": identity["digest"], "unet": identity["unet"]}
        (inputs.reference / "reference.json").write_text(json.dumps(facts))
    return inputs


def _write_pictures(inputs: Inputs) -> None:
    folder = Path(inputs.data.path)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    records = []
    for number in range(120):
        pixels = torch.randint(0, 256, (3, 3, 3), generator=generator, dtype=torch.uint8).numpy()
        name = f"{number:02d}.png"
        # Stored, not deflated: the same bytes by every version of zlib, and these decide which pictures are chosen.
        drawn = Image.fromarray(pixels).resize((20, 24), Image.Resampling.NEAREST)
        drawn.save(folder / name, compress_level=0)
        caption = WORDS[number % len(WORDS)] if number < 96 else CHOSEN_BY[number % 2]
        (folder / name).with_suffix(".txt").write_text(caption)
        records.append(Record(name, caption, sha256_file(folder / name), 20, 24))
    inputs.pictures.mkdir()
    write_records(inputs.pictures / "train.jsonl", [r for r in records if r.caption in WORDS[4:]])
    write_records(inputs.pictures / "validation.jsonl", [r for r in records if r.caption in CHOSEN_BY])
    write_records(inputs.pictures / "test.jsonl", [r for r in records if r.caption in WORDS[:4]])


def _write_checkpoint(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    changed = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in load_file(weights).items()
    }
    save_file(changed, weights, metadata={"format": "pt"})


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        inputs = make(root, save_base(root / "mini"), anew=True)
        shutil.rmtree(KEPT, ignore_errors=True)
        encode_latents(
            inputs.load("vae", "text"), inputs.data, Encode(batch=8), inputs.pictures, root / "scratch", inputs.latents
        )
        base: Any = inputs.load()
        draw_reference(base, inputs.data, EVALUATION, inputs.pictures, root / "scratch", KEPT / "reference", root)
        for each in inputs.variations:
            base = inputs.load(folder=each.folder if each.kind == "finetune" else None)
            draw_alone(base, each.kind, each.folder, inputs.data, STUDY, EVALUATION, root / "scratch", each.alone)


if __name__ == "__main__":
    main()
