"""Training from a bucket against training from a folder: python -m benchmarks.remote [--pictures 8000] [--json FILE]

Random latents of the model's shape are in a SeaweedFS server on this machine, and the same ones in a folder. Those of
the bucket may take a tenth of their size on disk. The two take steps of a distillation in turns. The figure is the time
of the bucket's steps relative to the folder's, the median over the turns with the range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from lcmlora import bases, config
from lcmlora.data.latents.cache import MANIFEST, UNCONDITIONAL, VERSION, LatentCache, Manifest
from lcmlora.data.latents.store import UnfinishedCache
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.training.loop import take_step
from tests.integration.seaweed import REGION, SeaweedFS


def make(base: bases.LoadedBase, folder: Path, pictures: int, rows: int, place: str | None) -> int:
    """Writes a cache of random latents and returns the bytes of its shards."""
    generator = torch.Generator().manual_seed(0)
    store = UnfinishedCache(folder.with_name(folder.name + "-work"), "random", place)
    names = [f"shard-{number:05d}.safetensors" for number in range(pictures // rows)]
    for number, name in enumerate(names):
        mean = torch.randn(rows, *base.latent_shape, generator=generator).half()
        tensors = {
            "latent_mean": mean,
            "latent_logvar": torch.full_like(mean, -8),
            "orig_size": torch.full((rows, 2), base.resolution, dtype=torch.int32),
            "crop_tl": torch.zeros(rows, 2, dtype=torch.int32),
            "text_row": torch.full((rows,), number % 20, dtype=torch.int32),
            "key": torch.zeros(rows, 16, dtype=torch.uint8),
        }
        store.save_shard(name, tensors, "random")
    text = base.encode_text([f"subject {number}" for number in range(20)])
    unconditional = {f"{UNCONDITIONAL}{name}": value for name, value in base.unconditional().items()}
    store.save_text(text | unconditional, captions=20, cut=0)
    assert store.text is not None
    manifest = Manifest(
        version=VERSION,
        model=base.name,
        kind=base.family.name,
        pictures=rows * len(names),
        latent_shape=base.latent_shape,
        resolution=base.resolution,
        fingerprint="random",
        shards=[store.shards[name] for name in names],
        text=store.text,
        rows=store.save_rows(names) if place else None,
        at=place,
    )
    with atomic_folder(folder) as out:
        for path in store.files.iterdir():
            path.rename(out / path.name)
        manifest.write(out / MANIFEST)
    return sum(shard.bytes for shard in manifest.shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = config.load(Path("params.yaml"))
    rows = options.pictures // options.shards
    with tempfile.TemporaryDirectory(prefix="lcmlora-remote-") as folder:
        work = Path(folder)
        (work / "server").mkdir()
        server = SeaweedFS(work / "server")
        server.start()
        try:
            server.client().create_bucket(Bucket="latents")
            access, secret = server.keys["writer"]
            os.environ |= {"AWS_ENDPOINT_URL": server.endpoint, "AWS_DEFAULT_REGION": REGION}
            os.environ |= {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret}
            found = measure(settings, options, work, rows)
        finally:
            server.kill()
    print(tables.markdown(["training from a bucket", ""], [[name, str(value)] for name, value in found.items()]))
    if options.json:
        write_json(options.json, found)


def measure(settings: config.Config, options: argparse.Namespace, work: Path, rows: int) -> dict[str, Any]:
    """Returns the figures."""
    model = options.model
    device = bases.pick_device("auto")
    # A window takes half of the budget, so that the next one's shards can be fetched while it is read.
    distillation = settings.distill_for(model).model_copy(update={"window": options.pictures // 25})
    dtype = bases.pick_dtype(distillation.precision, device)

    def load(*parts: str) -> bases.LoadedBase:
        return bases.load(model, settings.base(model), Path("bases", model), device=device, dtype=dtype, parts=parts)

    encoders = load("text")
    for name, place in (("here", None), ("there", "s3://latents/shards")):
        size = make(encoders, work / name, options.pictures, rows, place)
    budget = size // 10
    caches = {
        "here": LatentCache(work / "here", ram_bytes=0),
        "there": LatentCache(work / "there", shards=work / "disk", budget=budget),
    }
    base = load("network")
    optimization = add_adapter(base, distillation)
    distillation_loss = Distillation(base, caches["here"].unconditional(), distillation)
    streams = {
        name: sample_stream(cache, torch.arange(len(cache)), distillation, device) for name, cache in caches.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for turn in range(options.turns + 1):
        for name in sorted(streams, reverse=turn % 2 == 0):
            began = time.perf_counter()
            for step in range(turn * options.steps, (turn + 1) * options.steps):
                _, norm = take_step(distillation_loss, optimization, streams[name], distillation, step)
            norm.item()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    ratios = [there / here for there, here in zip(seconds["there"], seconds["here"], strict=True)]
    return {
        "pictures": options.pictures,
        "shards": options.shards,
        "megabytes": round(size / 1e6, 1),
        "budget, megabytes": round(budget / 1e6, 1),
        "window, pictures": distillation.window,
        "epochs": round(options.steps * (options.turns + 1) * distillation.batch / options.pictures, 2),
        "time of a step, of one from the folder": round(statistics.median(ratios), 3),
        "of all steps": round(sum(seconds["there"]) / sum(seconds["here"]), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "pictures/s from the folder": round(distillation.batch * options.steps / statistics.median(seconds["here"]), 1),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
