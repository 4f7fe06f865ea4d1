"""Settings of stage `compatibility`: what people add to the base, with which the adapter is tried."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lcmlora.settings.fields import Name, Positive, Quotable, Strict

Strength = Annotated[float, Field(gt=0, le=1)]


class AddedLora(Strict):
    """A style LoRA that is added at some weights."""

    source: Quotable
    """A .safetensors file that diffusers can load, or the folder of an adapter."""
    weights: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5, 1.0)
    """Weights of the LoRA. The acceleration has weight 1."""


class AddedControlNet(Strict):
    """A ControlNet of the base's family."""

    source: Quotable
    """Its folder, as diffusers saves it."""
    picture: Literal["edges", "picture"] = "edges"
    """What it is given of a real picture: its edges, or the picture itself."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """controlnet_conditioning_scale of diffusers."""


class AddedIpAdapter(Strict):
    """An IP-Adapter, which lets a picture stand beside the caption."""

    source: Quotable
    """The folder that has `subfolder`."""
    subfolder: str = "models"
    """Folder of the weights."""
    weight_name: str = "ip-adapter_sd15.safetensors"
    """File of the weights."""
    encoder: str = "image_encoder"
    """Folder of the image encoder, within `subfolder`."""
    scale: Annotated[float, Field(gt=0)] = 0.6
    """Weight of the picture beside the caption."""


class Compatibility(Strict):
    """The adapter together with what people add to the base (stage `compatibility`)."""

    models: tuple[Name, ...] = ()
    """Which of `models` are tried. The others are released without a table of compatibility."""
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 4, 8)
    """Steps of the student."""
    pictures: Annotated[int, Field(ge=2)] = 352
    """Pictures of each set, more than the features have dimensions. Most of the time goes into the teacher, which draws
    two sets with each addition."""
    loras: dict[Name, AddedLora] = {}
    """Style LoRAs by name."""
    img2img: tuple[Strength, ...] = (0.4, 0.7)
    """Strengths at which real pictures are drawn anew. Not tried without real pictures."""
    inpainting: bool = False
    """Whether one half of real pictures is drawn anew."""
    controlnets: dict[Name, AddedControlNet] = {}
    """ControlNets by name."""
    ip_adapters: dict[Name, AddedIpAdapter] = {}
    """IP-Adapters by name."""
    int8: bool = True
    """Whether the base is tried with the network's weights rounded to int8."""
    fp16_vae: bool = True
    """Whether the base is tried with its VAE in fp16."""
    limit: Annotated[float, Field(gt=1)] = 2.0
    """An addition fails where the student's excess with it is more than so many times its excess without it, beyond
    chance."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key in ("steps", "img2img"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: a number stands there twice: {', '.join(f'{v:g}' for v in values)}")
        return self
