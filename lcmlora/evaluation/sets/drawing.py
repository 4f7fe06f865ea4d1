"""What draws and measures the batches of image sets: in this process, or in each of many workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcmlora.adapters import formats, lora
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Evaluation, Launch
from lcmlora.errors import UserError
from lcmlora.evaluation.image_sets import Batch, Drawers, draw_batch
from lcmlora.evaluation.measures import distances, scores
from lcmlora.evaluation.measures import features as feature_sets
from lcmlora.evaluation.measures.features import Features
from lcmlora.evaluation.measures.scores import Scorer
from lcmlora.io.files import sha256_file
from lcmlora.parallel.workers import workers


def load_features(base: LoadedBase, settings: Evaluation) -> Features:
    return feature_sets.load(settings.features, base.device, settings.features_source)


def load_check(base: LoadedBase, settings: Evaluation) -> Features | None:
    """Returns the second features; None where the settings have none, or too few pictures for their distance."""
    if settings.check_features is None:
        return None
    check = feature_sets.load(settings.check_features, base.device, settings.check_features_source)
    return None if settings.pictures < pictures_needed(check) else check


def load_scorers(base: LoadedBase, settings: Evaluation) -> list[Scorer]:
    return [scores.load(name, base.device, settings.scores_source.get(name)) for name in settings.scores]


def pictures_needed(features: Features) -> int:
    return distances.named(features.distance).pictures_needed(features.dimensions)


def adapter_layers(adapter: Path) -> tuple[lora.Layers, str]:
    """Returns the factors of the adapter in a folder, of scale 1, and the SHA-256 of its file."""
    weights = adapter / lora.WEIGHTS
    read = formats.read(weights)
    return {name: (layer.down, layer.folded.up) for name, layer in read.layers.items()}, sha256_file(weights)


@contextmanager
def drawers(
    launch: Launch, load: Callable[[], LoadedBase], base: LoadedBase, settings: Evaluation, adapter: Path | None = None
) -> Iterator[Drawers | None]:
    """Yields the workers that draw, which end with the block; None where this process does.

    Args:
        load: loads `base` in each of them.
        adapter: the folder of an adapter, with which they draw.
    """
    if launch.alone:
        yield None
        return
    make = MakeDrawer(load, base.dtype, settings, adapter)
    with workers(launch, make, settings.device) as pool:
        yield pool


@dataclass(frozen=True)
class MakeDrawer:
    """Makes the function that draws batches in a worker.

    load: loads the base there.
    dtype: that the base must have.
    adapter: the folder of an adapter, with which it draws.
    """

    load: Callable[[], LoadedBase]
    dtype: torch.dtype
    settings: Evaluation
    adapter: Path | None

    def __call__(self) -> Callable[[Batch], dict[str, Tensor]]:
        """Raises UserError if the base is loaded in another precision here, in which it would draw other pictures."""
        base, settings = self.load(), self.settings
        if base.dtype != self.dtype:
            raise UserError(
                f"{base.name}: a worker would draw in {base.dtype} on its {base.device.type}, and the process that "
                f"starts it has {self.dtype}; use workers with the same kind of device as that"
            )
        identity = ""
        if self.adapter:
            layers, identity = adapter_layers(self.adapter)
            lora.apply(base.network, layers, str(self.adapter))  # for as long as the worker lives
        features, check = load_features(base, settings), load_check(base, settings)
        scorers = load_scorers(base, settings)

        def draw(batch: Batch) -> dict[str, Tensor]:
            assert batch.adapter == identity
            scored = [scorer for scorer in scorers if scorer.name in batch.scores]
            return draw_batch(base, features, check if batch.checked else None, scored, batch)

        return draw
