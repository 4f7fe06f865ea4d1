"""Tables of classes by name: base families, sources, objectives, samplers, features, distances, scores and stores.

A class is imported when it is first used, so that the names in params.yaml can be checked without importing torch. To
add a class,

* in this package: write it, and add its line to the table;
* in a package of your own: declare an entry point, which every process finds,

      [project.entry-points."lcmlora.sources"]
      webcam = "my_package.webcam:Webcam"

* in a script or a test: `SOURCES.register("webcam", Webcam)`, for this process alone.

These base classes say what a class must have:

    FAMILIES    lcmlora.bases.families.family.Family
    SOURCES     lcmlora.data.sources.source.Source
    OBJECTIVES  lcmlora.diffusion.objectives.Objective
    SAMPLERS    lcmlora.diffusion.samplers.StudentSampler
    FEATURES    lcmlora.evaluation.measures.features.Features
    DISTANCES   lcmlora.evaluation.measures.distances.Distance
    SCORES      lcmlora.evaluation.measures.scores.Scorer, or a function of pictures and prompts
    STORES      lcmlora.releases.stores.store.Store
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lcmlora.errors import UserError


class Table:
    """Classes by name.

    Args:
        key: the setting that names one, for messages.
        group: of the entry points of other packages.
        places: the classes of this package, each as `module:Class`.
    """

    def __init__(self, key: str, group: str, places: Mapping[str, str]) -> None:
        self.key = key
        self._group = group
        self._places = dict(places)
        self._classes: dict[str, type[Any]] = {}

    @property
    def names(self) -> list[str]:
        """All names: this package's own, then those of other packages, then those that were registered."""
        return list(dict.fromkeys([*self._places, *self._declared(), *self._classes]))

    def register(self, name: str, added: type[Any]) -> None:
        """Adds a class in this process. Raises ValueError if another class has the name."""
        if name in self.names and self._classes.get(name) is not added:
            raise ValueError(f"{self.key}: there is a {name} already")
        self._classes[name] = added

    def check(self, name: str) -> str:
        """Returns the name. Raises ValueError if the table does not have it."""
        # Entry points are read last, since that looks into every installed package.
        if name in self._places or name in self._classes or name in self._declared():
            return name
        raise ValueError(f"expected one of {', '.join(self.names)}")

    def is_built_in(self, name: str) -> bool:
        """Returns whether the class of this name comes with this package."""
        return name in self._places

    def get(self, name: str) -> Any:
        """Returns the class of this name, imported if need be.

        Raises:
            UserError: there is no such name, or another package's class cannot be imported.
        """
        try:
            self.check(name)
        except ValueError as error:
            raise UserError(f"{self.key}: got {name!r}: {error}") from None
        if name not in self._classes:
            self._classes[name] = self._imported(name)
        return self._classes[name]

    def _imported(self, name: str) -> type[Any]:
        if name in self._places:
            module, _, attribute = self._places[name].partition(":")
            found: type[Any] = getattr(import_module(module), attribute)
            return found
        declared = self._declared()[name]
        try:
            loaded: type[Any] = declared.load()
            return loaded
        except (ImportError, AttributeError) as error:
            package = declared.dist.name if declared.dist else declared.module
            raise UserError(f"{self.key}: {name}: {package} declares {declared.value}, and {error}") from error

    def _declared(self) -> Mapping[str, EntryPoint]:
        return _declared(self._group, tuple(sys.path))


@functools.cache  # each look opens a file of every installed package
def _declared(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Returns the entry points of the packages on this path."""
    return {each.name: each for each in entry_points(group=group)}


FAMILIES = Table(  # a base's model_index.json names the pipeline, by which its family is found
    "a base's family",
    "lcmlora.families",
    {
        "sd": "lcmlora.bases.families.stable_diffusion:StableDiffusion",
        "sdxl": "lcmlora.bases.families.sdxl:SDXL",
    },
)

SOURCES = Table(
    "data.source",
    "lcmlora.sources",
    {
        "emoji": "lcmlora.data.sources.emoji:Emoji",
        "folder": "lcmlora.data.sources.folder:Folder",
        "parquet": "lcmlora.data.sources.parquet:Parquet",
        "webdataset": "lcmlora.data.sources.tars:Tars",
        "prompts": "lcmlora.data.sources.prompts:Prompts",
    },
)

OBJECTIVES = Table(
    "distill.objective",
    "lcmlora.objectives",
    {
        "lcm": "lcmlora.diffusion.objectives:LatentConsistency",
        "tcd": "lcmlora.diffusion.objectives:TrajectoryConsistency",
        "pcm": "lcmlora.diffusion.objectives:PhasedConsistency",
        "tdd": "lcmlora.diffusion.objectives:TargetDriven",
    },
)

SAMPLERS = Table(  # by the scheduler of diffusers that draws so; objectives name theirs
    "the sampler's scheduler",
    "lcmlora.samplers",
    {
        "LCMScheduler": "lcmlora.diffusion.samplers:MultistepConsistency",
        "TCDScheduler": "lcmlora.diffusion.samplers:StrategicStochastic",
    },
)

FEATURES = Table(
    "evaluation.features",
    "lcmlora.features",
    {
        "efficientnet-lite0": "lcmlora.evaluation.measures.features:EfficientNetLite0",
        "efficientnet-lite0-crops": "lcmlora.evaluation.measures.features:EfficientNetCrops",
        "inception": "lcmlora.evaluation.measures.features:Inception",
        "clip": "lcmlora.evaluation.measures.features:ClipPictures",
        "scattering": "lcmlora.evaluation.measures.scattering:Scattering",
    },
)

DISTANCES = Table(  # features name theirs
    "the features' distance",
    "lcmlora.distances",
    {
        "frechet": "lcmlora.evaluation.measures.distances:Frechet",
        "cmmd": "lcmlora.evaluation.measures.distances:Cmmd",
    },
)

SCORES = Table(
    "evaluation.scores",
    "lcmlora.scores",
    {
        "clip-score": "lcmlora.evaluation.measures.scores:ClipScore",
        "image-reward": "lcmlora.evaluation.measures.scores:ImageReward",
        "hps": "lcmlora.evaluation.measures.scores:Hps",
    },
)

STORES = Table(  # by the scheme of an address; a path without one is a file's
    "publish.to",
    "lcmlora.stores",
    {
        "file": "lcmlora.releases.stores.directory:DirectoryStore",
        "s3": "lcmlora.releases.stores.s3:S3Store",
        "hf": "lcmlora.releases.stores.hub:HubStore",
    },
)
