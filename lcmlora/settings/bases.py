"""Settings of the base models, and of what is trained besides: `bases`, `styles` and `finetunes`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from lcmlora.io.parsing import JsonObject
from lcmlora.settings.data import Data, Encode
from lcmlora.settings.evaluation import Evaluation
from lcmlora.settings.fields import Name, Positive, Quotable, Strict
from lcmlora.settings.layers import Changes
from lcmlora.settings.training import Distill, Launch, Tuning, extended_distill_settings


class Merged(Strict):
    """A LoRA that is summed into a base."""

    source: Quotable
    """A .safetensors file in any spelling, or the folder of an adapter."""
    weight: float = 1.0
    """Weight of the LoRA."""


class Base(Strict):
    """A base model, and what differs from its family's settings."""

    source: Quotable
    """A hub id, a diffusers folder, or a .safetensors file in the original layout."""
    revision: (
        Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]
        | None
    ) = None
    """Commit of the hub. A hub id needs it, so that a run can be repeated."""
    config: str | None = None
    """Of a .safetensors file: the diffusers folder or hub id with the configurations that it goes with."""
    variant: Name | None = None
    """Variant of the weight files, such as fp16."""
    style: Merged | None = None
    """A LoRA that is merged into the base before distillation."""
    like: str | None = None
    """Family whose settings this base gets: sd15, sd21 or sdxl. A published base, and a folder or file whose UNet has
    the family's width, need not say it."""
    resolution: Positive
    """Width and height of the training pictures in pixels. By default what the folder's UNet was made for, or the
    family's."""
    license: Quotable
    """License of the base, for the model card."""
    author: Quotable | None = None
    """Who makes the adapter, for the header of its files, which programs show."""
    data: Annotated[JsonObject, Changes(Data)] = {}
    """Changes of `data` for this base, which then learns from pictures of its own. After a change of which bases have
    some, run `lcmlora resolve`: it writes the stages of dvc.yaml that read pictures."""
    encode: Annotated[JsonObject, Changes(Encode)] = {}
    """Changes of `encode` for this base."""
    launch: Annotated[JsonObject, Changes(Launch)] = {}
    """Changes of `launch` for this base."""
    distill: Annotated[JsonObject, Changes(Distill, extended_distill_settings)] = {}
    """Changes of `distill` for this base."""
    evaluation: Annotated[JsonObject, Changes(Evaluation)] = {}
    """Changes of `evaluation` for this base."""

    @model_validator(mode="after")
    def _config_of_a_file(self) -> Self:
        if self.config is not None and not self.source.endswith(".safetensors"):
            raise ValueError(f"config goes with a .safetensors source, and source is {self.source}")
        return self


class Variation(Strict):
    """A style or a fine-tuned checkpoint: the pictures it learns from, and what differs in its training."""

    data: Annotated[JsonObject, Changes(Data)] = {}
    """Changes of `data`."""
    training: Annotated[JsonObject, Changes(Tuning)] = {}
    """Changes of `style` or `finetune`."""
