"""What people add to a base: style LoRAs, a picture to start from, ControlNets, IP-Adapters, int8 weights, an fp16 VAE.

Each is added as diffusers' users add it, to a pipeline without the adapter (the teacher's) and to one with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image, ImageFilter

from lcmlora.bases import diffusers_pipeline
from lcmlora.config import Compatibility
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons.compatibility import NOTHING, AdditionKind
from lcmlora.inference.source_picture import fit
from lcmlora.io import faults
from lcmlora.io.files import sha256_file, sha256_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Facts = dict[str, str | int | float]
_STYLE = "style"  # the name of a style LoRA in a pipeline
_EDGE = 40  # of 255: fainter differences between neighbouring pixels are no edge


class Addition(ABC):
    """One addition at one strength.

    needs_pictures: whether each caption needs a real picture.
    strength: at which real pictures are drawn anew; None where drawing starts from noise alone.
    """

    kind: ClassVar[AdditionKind]
    needs_pictures: ClassVar[bool] = False
    strength: float | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """How settings and files name it: `lora ink 0.5`."""

    @property
    def title(self) -> str:
        """How a reader calls it."""
        return self.name

    @cached_property
    def facts(self) -> Facts:
        """What exactly is added: strengths, and the SHA-256 of files, which may be large and are read once."""
        return {}

    @property
    def loras(self) -> dict[str, float]:
        """The weights of the LoRAs that `added` has loaded, by their names in the pipeline."""
        return {}

    def added(self, pipeline: Any) -> Any:
        """Returns the pipeline with the addition.

        Raises:
            UserError: diffusers cannot load the addition, or it does not fit the base.
        """
        return pipeline

    def teacher(self, pipeline: Any) -> Any:
        """Returns the pipeline of diffusers by which the teacher draws with this addition."""
        return pipeline

    def teacher_inputs(self, pictures: Sequence[Image.Image], side: int) -> dict[str, Any]:
        """Returns the teacher's arguments for these real pictures, besides captions and settings.

        Args:
            side: of the pictures to draw, in pixels.
        """
        return {"height": side, "width": side}

    def student_inputs(self, picture: Image.Image) -> dict[str, Any]:
        """Returns the student's arguments for a real picture: those of `Drawer`."""
        return {}


class Nothing(Addition):
    """No addition: what the others are compared with."""

    kind = "nothing"
    name = NOTHING
    title = "nothing added"


@dataclass(frozen=True)
class StyleLora(Addition):
    """A style LoRA."""

    label: str
    source: Path
    weight: float

    kind: ClassVar[AdditionKind] = "lora"

    @property
    def name(self) -> str:
        return f"lora {self.label} {self.weight:g}"

    @property
    def title(self) -> str:
        return f"style LoRA {self.label}, weight {self.weight:g}"

    @property
    def _file(self) -> Path:
        from lcmlora.adapters.metadata import WEIGHTS

        return self.source / WEIGHTS if self.source.is_dir() else self.source

    @cached_property
    def facts(self) -> Facts:
        return {"weight": self.weight, "sha256": sha256_file(self._file)}

    def added(self, pipeline: Any) -> Any:
        from lcmlora.adapters import tensorfile

        tensorfile.check_harmless(self._file)
        try:
            pipeline.load_lora_weights(self._file.parent, weight_name=self._file.name, adapter_name=_STYLE)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self._file}: plain diffusers cannot load it: {_line(error)}") from error
        return pipeline

    @property
    def loras(self) -> dict[str, float]:
        return {_STYLE: self.weight}


@dataclass(frozen=True)
class Img2Img(Addition):
    """Real pictures that are drawn anew from some noise on."""

    strength: float

    kind: ClassVar[AdditionKind] = "img2img"
    needs_pictures = True

    @property
    def name(self) -> str:
        return f"img2img {self.strength:g}"

    @property
    def title(self) -> str:
        return f"img2img, strength {self.strength:g}"

    @cached_property
    def facts(self) -> Facts:
        return {"strength": self.strength}

    def teacher(self, pipeline: Any) -> Any:
        import diffusers

        return diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)

    def teacher_inputs(self, pictures: Sequence[Image.Image], side: int) -> dict[str, Any]:
        return {"image": [fit(picture, side, side) for picture in pictures], "strength": self.strength}

    def student_inputs(self, picture: Image.Image) -> dict[str, Any]:
        return {"image": picture, "strength": self.strength}


class Inpainting(Addition):
    """Real pictures whose right half is drawn anew."""

    kind = "inpainting"
    name = "inpainting"
    title = "inpainting, the right half"
    needs_pictures = True

    def teacher(self, pipeline: Any) -> Any:
        import diffusers

        return diffusers.AutoPipelineForInpainting.from_pipe(pipeline)

    def teacher_inputs(self, pictures: Sequence[Image.Image], side: int) -> dict[str, Any]:
        fitted = [fit(picture, side, side) for picture in pictures]
        masks = [_right_half(picture.size) for picture in fitted]
        return {"image": fitted, "mask_image": masks, "strength": 1.0, "height": side, "width": side}

    def student_inputs(self, picture: Image.Image) -> dict[str, Any]:
        return {"image": picture, "mask": _right_half(picture.size), "strength": 1.0}


@dataclass(frozen=True)
class ControlNet(Addition):
    """A ControlNet, given edges of real pictures or the pictures themselves."""

    label: str
    source: Path
    picture: str
    scale: float

    kind: ClassVar[AdditionKind] = "controlnet"
    needs_pictures = True

    @property
    def name(self) -> str:
        return f"controlnet {self.label}"

    @property
    def title(self) -> str:
        return f"ControlNet {self.label}"

    @cached_property
    def facts(self) -> Facts:
        return {"picture": self.picture, "scale": self.scale, "sha256": sha256_folder(self.source)}

    def added(self, pipeline: Any) -> Any:
        return diffusers_pipeline.with_controlnet(pipeline, self.source).to(pipeline.device)

    def teacher_inputs(self, pictures: Sequence[Image.Image], side: int) -> dict[str, Any]:
        controls = [self._control(fit(picture, side, side)) for picture in pictures]
        return {"image": controls, "controlnet_conditioning_scale": self.scale, "height": side, "width": side}

    def student_inputs(self, picture: Image.Image) -> dict[str, Any]:
        return {"control": self._control(picture), "control_scale": self.scale}

    def _control(self, picture: Image.Image) -> Image.Image:
        if self.picture == "picture":
            return picture
        edges = picture.convert("L").filter(ImageFilter.FIND_EDGES)
        return edges.point(lambda value: 255 * (value > _EDGE)).convert("RGB")


@dataclass(frozen=True)
class IpAdapter(Addition):
    """An IP-Adapter, given real pictures."""

    label: str
    source: Path
    subfolder: str
    weight_name: str
    encoder: str
    scale: float

    kind: ClassVar[AdditionKind] = "ip-adapter"
    needs_pictures = True

    @property
    def name(self) -> str:
        return f"ip-adapter {self.label}"

    @property
    def title(self) -> str:
        return f"IP-Adapter {self.label}"

    @cached_property
    def facts(self) -> Facts:
        return {"scale": self.scale, "sha256": sha256_file(self.source / self.subfolder / self.weight_name)}

    def added(self, pipeline: Any) -> Any:
        try:
            pipeline.load_ip_adapter(
                str(self.source),
                subfolder=self.subfolder,
                weight_name=self.weight_name,
                image_encoder_folder=self.encoder,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self.source}: diffusers cannot load it as an IP-Adapter: {_line(error)}") from error
        pipeline.set_ip_adapter_scale(self.scale)
        return pipeline.to(pipeline.device)

    def teacher_inputs(self, pictures: Sequence[Image.Image], side: int) -> dict[str, Any]:
        fitted = [fit(picture, side, side) for picture in pictures]
        return {"ip_adapter_image": [fitted], "height": side, "width": side}

    def student_inputs(self, picture: Image.Image) -> dict[str, Any]:
        return {"reference": picture}


class Int8Weights(Addition):
    """The network's weights rounded to int8, one scale for each output channel, and computed with in its precision.

    This is what weight-only int8 computes in any library, without its smaller memory.
    """

    kind = "int8 weights"
    name = "int8"
    title = "base in int8"

    def added(self, pipeline: Any) -> Any:
        import torch

        with torch.no_grad():
            for module in diffusers_pipeline.network_of(pipeline).modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    module.weight.copy_(_rounded_to_int8(module.weight))
        return pipeline


class Fp16Vae(Addition):
    """The VAE in fp16 whatever it was made for: SDXL's first one gives numbers that fp16 does not hold."""

    kind = "fp16 VAE"
    name = "fp16-vae"
    title = "VAE in fp16"

    def added(self, pipeline: Any) -> Any:
        import torch

        vae = pipeline.vae.to(torch.float16)
        vae.register_to_config(force_upcast=False)  # otherwise diffusers decodes in fp32
        first = vae.post_quant_conv if getattr(vae, "post_quant_conv", None) is not None else vae.decoder
        first.register_forward_pre_hook(lambda _, inputs: tuple(value.half() for value in inputs))
        return pipeline


def additions_of(settings: Compatibility, root: Path) -> list[Addition]:
    """Returns the additions that the settings ask for, `Nothing` first.

    Args:
        root: the folder that relative paths of the settings are relative to.

    Raises:
        UserError: a file or folder is missing.
    """
    found: list[Addition] = [Nothing()]
    for label, lora in settings.loras.items():
        source = _existing(root / lora.source, f"compatibility.loras.{label}.source")
        found += [StyleLora(label, source, weight) for weight in lora.weights]
    found += [Img2Img(strength) for strength in settings.img2img]
    found += [Inpainting()] if settings.inpainting else []
    for label, net in settings.controlnets.items():
        source = _existing(root / net.source, f"compatibility.controlnets.{label}.source")
        found.append(ControlNet(label, source, net.picture, net.scale))
    for label, ip in settings.ip_adapters.items():
        source = _existing(root / ip.source, f"compatibility.ip_adapters.{label}.source")
        found.append(IpAdapter(label, source, ip.subfolder, ip.weight_name, ip.encoder, ip.scale))
    found += [Int8Weights()] if settings.int8 else []
    found += [Fp16Vae()] if settings.fp16_vae else []
    return found


def _existing(path: Path, key: str) -> Path:
    if not path.exists():
        raise UserError(f"{key}: {path}: no such file or folder")
    return path


def _right_half(size: tuple[int, int]) -> Image.Image:
    """Returns a mask of this size, white in its right half."""
    width, height = size
    mask = Image.new("L", size, 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def _rounded_to_int8(weight: Tensor) -> Tensor:
    """Returns the nearest of 255 values of each output channel, symmetric about 0, in the weight's precision."""
    largest: torch.Tensor = weight.float().flatten(1).abs().amax(dim=1).clamp(min=1e-12)
    scale = (largest / 127).reshape(-1, *[1] * (weight.dim() - 1))
    return ((weight.float() / scale).round().clamp(-127, 127) * scale).to(weight.dtype)


def _line(error: Exception) -> str:
    return faults.chain(error)
