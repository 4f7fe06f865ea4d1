"""The paths of everything in a project's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lcmlora.config import Config, Data, Evaluation

PARAMS = "params.yaml"

_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Project:
    """The folder of a project, with the path of everything in it. Where `root` is relative, all paths are.

    Paths in params.yaml are relative to this folder, too. `settings` and `located...` return them relative to the
    current folder.

    Args:
        params: the configuration file, if it is not the folder's own params.yaml.
    """

    root: Path = Path()
    params: Path | None = None

    @property
    def params_file(self) -> Path:
        """The configuration file."""
        return self.params if self.params is not None else self.root / PARAMS

    @property
    def dvc_yaml(self) -> Path:
        """The stages."""
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        """The inputs and outputs of each stage's last run, written by DVC."""
        return self.root / "dvc.lock"

    @property
    def resolved(self) -> Path:
        """The settings and versions that decide each stage's result, which DVC reads as parameters."""
        return self.root / "resolved.yaml"

    @property
    def npm_lock(self) -> Path:
        """The versions of the npm packages with the emoji artwork."""
        return self.root / "package-lock.json"

    @property
    def npm_packages(self) -> Path:
        """The npm packages with the emoji artwork, if they are installed."""
        return self.root / "node_modules"

    @property
    def bases(self) -> Path:
        """The bases, as `lcmlora fetch` puts them there."""
        return self.root / "bases"

    def base(self, model: str) -> Path:
        """The base of a model, a diffusers folder."""
        return self.bases / model

    @property
    def pictures(self) -> Path:
        """The lists of the prepared pictures of `data`; models without pictures of their own learn from these."""
        return self.root / "data" / "pictures"

    def own_pictures(self, model: str) -> Path:
        """The lists of the prepared pictures of a model whose base has `data` of its own."""
        return self.root / "data" / "own-pictures" / model

    def pictures_of(self, model: str, config: Config) -> Path:
        """The lists of the prepared pictures that a model learns from: its own, or else those of `data`."""
        return self.own_pictures(model) if config.has_own_data(model) else self.pictures

    def latents(self, model: str) -> Path:
        """The latent cache of a model."""
        return self.root / "data" / "latents" / model

    def reference(self, model: str) -> Path:
        """The image sets of teacher and solvers, with their features."""
        return self.root / "reference" / model

    def adapter(self, model: str) -> Path:
        """The trained adapter."""
        return self.root / "adapters" / model

    def distilled(self, model: str, config: Config) -> Path:
        """The adapter as it was distilled, in a folder of its own where it is polished afterwards."""
        return self.root / "distilled" / model if config.distill_for(model).polish else self.adapter(model)

    def evaluation(self, model: str) -> Path:
        """The student's image sets, and the pictures of the evaluation."""
        return self.root / "evaluation" / model

    def metrics(self, model: str) -> Path:
        """The metrics of the student, the teacher and the solvers."""
        return self.root / "metrics" / f"{model}.json"

    def plot(self, model: str) -> Path:
        """The excess distance by network evaluations, which `dvc plots` draws."""
        return self.root / "plots" / f"{model}_steps.csv"

    def variations(self, model: str) -> Path:
        """The styles and fine-tunes of a model, and their image sets without the adapter."""
        return self.root / "variations" / model

    def style(self, model: str, name: str) -> Path:
        """The LoRA of a style."""
        return self.variations(model) / "styles" / name

    def finetune(self, model: str, name: str) -> Path:
        """The checkpoint of a fine-tune, a base of its own."""
        return self.variations(model) / "finetunes" / name

    def alone(self, model: str, name: str) -> Path:
        """The image sets of a style or a fine-tune without the adapter."""
        return self.variations(model) / "alone" / name

    @property
    def studies(self) -> Path:
        """The studies of all models."""
        return self.root / "study"

    def study(self, model: str) -> Path:
        """The study of a model: its adapter added to styles and fine-tunes."""
        return self.studies / model

    @property
    def compatibilities(self) -> Path:
        """The figures of all adapters together with what people add to the bases."""
        return self.root / "compatibility"

    def compatibility(self, model: str) -> Path:
        """The figures of a model's adapter together with what people add to the base."""
        return self.compatibilities / f"{model}.json"

    def release(self, model: str) -> Path:
        """The bundle of a model, ready to be published."""
        return self.root / "release" / model

    def timings(self, model: str) -> Path:
        """The durations on this machine, apart from the results, which inputs and settings decide."""
        return self.root / "timings" / model

    @property
    def durations(self) -> Path:
        """The seconds that each stage took on this machine the last time."""
        return self.root / "timings" / "stages.json"

    @property
    def records(self) -> Path:
        """The records of what each stage ran with, apart from the results, which have no time and no commit."""
        return self.root / "timings" / "records"

    def scratch(self, *names: str) -> Path:
        """Work in progress, from which a killed run continues, and downloads."""
        return self.root.joinpath("scratch", *names)

    def settings(self) -> Config:
        """Returns the settings in params.yaml, with paths of registry and releases relative to the current folder.

        Paths that decide a result (of data, bases and image features) stay as they are written, since resolved.yaml and
        the adapters name them: the same project gives the same bytes wherever it is called from.

        Raises:
            UserError: see `config.load`.
        """
        from lcmlora import config

        settings = config.load(self.params_file, self.root)
        registry, publish = settings.registry, settings.publish
        tracking = registry.tracking_uri
        if tracking.startswith(_SQLITE):
            tracking = _SQLITE + self.located(tracking.removeprefix(_SQLITE))
        keys = {"signing_key": publish.signing_key, "verify_key": publish.verify_key}
        stores = [self.located(address) for address in publish.stores]
        places: dict[str, str | list[str] | None] = {"to": stores[0] if len(stores) == 1 else stores}
        places |= {name: None if key is None else self.located(key) for name, key in keys.items()}
        return settings.model_copy(
            update={
                "registry": registry.model_copy(update={"tracking_uri": tracking}),
                "publish": publish.model_copy(update=places),
            }
        )

    def located(self, place: str) -> str:
        """Returns a path of params.yaml relative to the current folder; an address as it is."""
        return place if self.root == Path() or "://" in place else str(self.root / place)

    def located_data(self, data: Data) -> Data:
        """Returns the settings of pictures with their path relative to the current folder."""
        return data.model_copy(update={"path": self.located(data.path)})

    def located_evaluation(self, settings: Evaluation) -> Evaluation:
        """Returns the settings with files of features and scores relative to the current folder. What is no file in the
        project is an id on the hub."""

        def located(source: str) -> str:
            return self.located(source) if (self.root / source).exists() else source

        sources = {"features_source": settings.features_source, "check_features_source": settings.check_features_source}
        located_sources = {name: None if source is None else located(source) for name, source in sources.items()}
        scores = {name: located(place) for name, place in settings.scores_source.items()}
        prompts = None if settings.prompts is None else self.located(settings.prompts)
        return settings.model_copy(update=located_sources | {"scores_source": scores, "prompts": prompts})
