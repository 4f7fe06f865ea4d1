"""What stages load, and the processes in which they do."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora.errors import UserError
from lcmlora.parallel.allocator import keep_freed_memory

if TYPE_CHECKING:
    from lcmlora.bases import LoadedBase
    from lcmlora.config import Base, Config, Distill, Evaluation, Launch
    from lcmlora.data.latents.cache import LatentCache
    from lcmlora.parallel.ranks import Ranks
    from lcmlora.project import Project


@contextlib.contextmanager
def ranks_of(launch: Launch, device: str) -> Iterator[Ranks]:
    """Yields this process's rank among those that train together.

    If several are configured and this process is none of them, it starts them with the same command, and exits with
    their status.
    """
    from lcmlora.parallel import launcher, ranks

    if launch.processes * launch.machines > 1 and not ranks.launched():
        raise SystemExit(launcher.launch(launch, "lcmlora", sys.argv[1:]))
    with ranks.connected(device) as connected:
        yield connected


def refuse_ranks(verb: str) -> None:
    """Raises UserError if torchrun or accelerate has started this process as one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{verb}: was started in {os.environ['WORLD_SIZE']} processes; start it once, `lcmlora {verb}`: it starts "
            "its workers itself, as many as launch.processes says"
        )


@dataclass(frozen=True)
class LoadBase:
    """Loads parts of a base on the device of this process, which may be a worker.

    device, precision: as in params.yaml.
    """

    name: str
    base: Base
    folder: Path
    device: str
    parts: tuple[str, ...]
    precision: str = "auto"

    def __call__(self) -> LoadedBase:
        from lcmlora import bases

        device = bases.pick_device(self.device)
        keep_freed_memory(device)
        dtype = bases.pick_dtype(self.precision, device)
        return bases.load(self.name, self.base, self.folder, device=device, dtype=dtype, parts=self.parts)


def drawing_base(
    project: Project, config: Config, model: str, folder: Path | None = None
) -> tuple[LoadBase, Evaluation]:
    """Returns what loads the base, or the fine-tuned checkpoint in `folder`, with all parts, and its evaluation
    settings."""
    settings = project.located_evaluation(config.evaluation_for(model))
    place = folder or project.base(model)
    return LoadBase(model, config.base(model), place, settings.device, ("network", "vae", "text")), settings


def base_and_cache(
    project: Project, config: Config, model: str, settings: Distill, *, pictures: bool, texts: bool = False
) -> tuple[LoadedBase, LatentCache]:
    """Returns the base and its latent cache. With `pictures`, the base has a VAE; with `texts`, its text encoders."""
    from lcmlora import bases
    from lcmlora.data.latents.cache import LatentCache

    bases.pick_device(settings.device)  # raises first if there is no such device
    budget = int(config.shard_cache_gb * 1e9)
    cache = LatentCache(project.latents(model), shards=project.scratch("shards", model), budget=budget)
    parts = ("network", *(["vae"] if pictures else []), *(["text"] if cache.tokenized or texts else []))
    base = LoadBase(model, config.base(model), project.base(model), settings.device, parts, settings.precision)()
    cache.embed = base.encode_tokens
    return base, cache
