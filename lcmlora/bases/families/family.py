"""The interface of a family of bases, with everything in which families differ; each family is a subclass.

A family has no state: its methods take the parts that they work with, and one instance serves all bases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lcmlora.adapters.layer_names import Naming
from lcmlora.adapters.lora import Placement
from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig
from lcmlora.bases.examination.structure import Shapes
from lcmlora.bases.examination.weightfiles import DIFFUSERS
from lcmlora.bases.schedule import Schedule
from lcmlora.errors import UserError
from lcmlora.patches.lora_forwards import refresh
from lcmlora.plugins import FAMILIES

DEFAULT_FAMILY = "sd"  # for a base of no known family; errors then say what it lacks of this one

# The network's inputs besides latents and time, by name: a row for each latent.
Conditioning = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A part of a pipeline, such as its VAE: a folder in the base's, which model_index.json names."""

    folder: str
    classes: tuple[str, ...]  # the classes that it may have; the first is the usual one
    weights: str = ""  # how its files of weights are named; empty for a part without weights


@dataclass(frozen=True)
class SingleFile:
    """The prefixes of tensors' names in a checkpoint in one file, by part."""

    network: tuple[str, ...]
    vae: tuple[str, ...]
    text: tuple[str, ...]
    text_encoders: dict[str, str]  # the prefix of each text encoder, by its folder


class Family(ABC):
    """A family of bases.

    name: its key in the table of families, and its name in the manifests of latent caches.
    title: its name in messages.
    pipeline: diffusers' class, by which model_index.json names the family.
    network, vae: the network and the VAE.
    text_encoders, tokenizers: in the order in which their embeddings are joined.
    placement: which layers an adapter changes, and how its file names them.
    single_file: the layout of a checkpoint in one file; None if the family has none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pipeline: ClassVar[str]
    network: ClassVar[Part]
    vae: ClassVar[Part] = Part("vae", ("AutoencoderKL",), DIFFUSERS)
    text_encoders: ClassVar[tuple[Part, ...]]
    tokenizers: ClassVar[tuple[Part, ...]]
    placement: ClassVar[Placement]
    single_file: ClassVar[SingleFile | None] = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts but the scheduler."""
        return (self.network, self.vae, *self.text_encoders, *self.tokenizers)

    def recognises(self, config: LibraryConfig) -> bool:
        """Returns whether a network of this configuration belongs to the family."""
        return config.get("_class_name") == self.network.classes[0]

    @abstractmethod
    def naming(self, config: LibraryConfig) -> Naming:
        """Returns the names that other programs have for a network of this configuration and its layers."""

    def drawing_options(self, index: LibraryConfig) -> DigestInput:
        """Returns the options in model_index.json that decide what is drawn; they enter the base's digest."""
        return {"family": self.name}

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Raises UserError if the configurations in a base's folder do not fit one another."""

    @abstractmethod
    def examine_schedule(self, folder: Path) -> DigestInput:
        """Returns the settings of a base's noise schedule. Raises UserError if they make no schedule."""

    @abstractmethod
    def examine_tokenizer(self, folder: Path, tokenizer: Part, encoder: Part) -> DigestInput:
        """Returns what decides a tokenizer's tokens. Raises UserError if it does not fit the encoder of its tokens."""

    @abstractmethod
    def shapes(self, folder: Path, part: Part) -> Shapes:
        """Returns the shapes of a part's weights by its configuration. Raises UserError if it makes no module."""

    @abstractmethod
    def check_network(self, config: LibraryConfig) -> None:
        """Raises UserError if a network of this configuration cannot be distilled."""

    @abstractmethod
    def size_unit(self, folder: Path) -> int:
        """Returns the number of pixels that the sides of a picture must be multiples of."""

    def native_resolution(self, config: LibraryConfig, vae: LibraryConfig) -> int | None:
        """Returns the side in pixels of the pictures that the network was made for; None if it does not say.

        Args:
            config, vae: the configurations of network and VAE; the latter may be empty.
        """
        size = config.get("sample_size")
        return size * self.latent_factor(vae) if isinstance(size, int) else None

    def build(self, config: LibraryConfig) -> nn.Module:
        """Returns a network of this configuration without its weights, on torch's default device.

        Raises whatever diffusers raises.
        """
        import diffusers

        network: nn.Module = getattr(diffusers, self.network.classes[0]).from_config(config)
        return network

    def input_shapes(self, config: LibraryConfig, tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each of the network's inputs besides latents and time, for one latent.

        Args:
            tokens: that the text encoders read of a caption; as many as those of published bases by default.

        Raises:
            UserError: the family has not said so, and what its bases take cannot be counted.
        """
        raise UserError(f"{config.place}: the inputs of {self.title}'s networks are not known, so nothing is counted")

    def usual_vae(self) -> LibraryConfig:
        """Returns the configuration of the VAE that bases of this family have, for one that is not here."""
        raise UserError(f"the VAE of {self.title} is not known, so nothing is counted")

    def usual_text_parameters(self, config: LibraryConfig) -> int:
        """Returns the number of the text encoders' parameters of a base that is not here, by its network's inputs."""
        raise UserError(f"{config.place}: the text encoders of {self.title} are not known, so nothing is counted")

    def load(self, part: Part, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        """Returns a part with weights, loaded from the base's folder. Raises whatever the libraries raise."""
        import diffusers
        import transformers

        is_text = part in self.text_encoders
        cls = getattr(transformers if is_text else diffusers, part.classes[0])
        options = {"dtype": dtype} if is_text else {"torch_dtype": dtype}
        return cls.from_pretrained(folder, subfolder=part.folder, variant=variant, use_safetensors=True, **options)

    def prepare(self, network: Any) -> None:
        """Installs the family's patches in a network, which is on its device; none by default."""
        del network

    def load_tokenizer(self, part: Part, folder: Path) -> Any:
        """Returns a tokenizer, loaded from the base's folder."""
        import transformers

        return getattr(transformers, part.classes[0]).from_pretrained(folder / part.folder)

    @abstractmethod
    def schedule(self, folder: Path, resolution: int) -> tuple[Schedule, LibraryConfig]:
        """Returns the noise schedule and diffusers' configuration of it, from which other schedulers are made.

        Args:
            resolution: the pictures' side in pixels, by which some families shift their noise levels.
        """

    @abstractmethod
    def forward(self, network: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's raw output (B, C, h, w) fp32, computed in its own precision.

        Args:
            latents: (B, C, h, w) fp32.
            time: (B,), the network's input for each timestep, see `Schedule.time`.
            conditioning: a row for each latent, `micro_conditioning` included.
        """

    def micro_conditioning(self, sizes: Tensor, crops: Tensor, targets: Tensor) -> Conditioning:
        """Returns the conditioning on pictures' sizes and crops, fp32; nothing by default.

        Args:
            sizes: (B, 2) of the original pictures, height before width, in pixels.
            crops: (B, 2) of the crops' corners, top before left, in pixels.
            targets: (B, 2) of the pictures that are trained on or drawn, height before width, in pixels.
        """
        return {}

    def tokenize(self, tokenizers: Sequence[Any], captions: list[str]) -> list[Tensor]:
        """Returns one tensor of token ids (B, T) int64 for each text encoder, padded and truncated to its length."""
        return [
            tokenizer(
                captions,
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            for tokenizer in tokenizers
        ]

    @abstractmethod
    def encode_tokens(self, text_encoders: Sequence[Any], token_ids: Sequence[Tensor]) -> Conditioning:
        """Returns the conditioning on captions, fp32, from their token ids (B, T) for each text encoder."""

    def empty_is_zeros(self, index: LibraryConfig) -> bool:
        """Returns whether the unconditional embedding is zeros, by model_index.json; else it is the empty prompt's."""
        return False

    def latent_factor(self, vae: LibraryConfig) -> int:
        """Returns the number of a picture's pixels in a row for one of the latent, by the VAE's configuration."""
        blocks = vae.get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 16 else 8

    def latent_channels(self, vae: LibraryConfig) -> int:
        """Returns the number of channels of a diffusion-ready latent."""
        return vae.integer("latent_channels", 4)

    def latent_scale(self, vae: LibraryConfig) -> float:
        """Returns the factor of the VAE's latents, by its configuration."""
        return vae.number("scaling_factor", 0.18215)

    def latent_shift(self, vae: LibraryConfig) -> float:
        """Returns the number that is subtracted from the VAE's latents before they are multiplied."""
        return vae.number("shift_factor", 0.0)

    def encode_pictures(self, vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the diffusion-ready latent, both (B, C, h, w) fp32."""
        posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
        config = LibraryConfig.of_module(vae)
        scale = torch.tensor(self.latent_scale(config))
        mean = posterior.mean.float() - self.latent_shift(config)
        return mean * scale, posterior.logvar.float() + 2 * scale.log()

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Diffusion-ready latents (B, C, h, w) -> pictures (B, 3, H, W) fp32 in [0, 1]."""
        config = LibraryConfig.of_module(vae)
        unscaled = latents / self.latent_scale(config) + self.latent_shift(config)
        return vae.decode(unscaled.to(vae.dtype)).sample.float().div(2).add(0.5).clamp(0, 1)


@cache
def _of_class(cls: type[Family]) -> Family:
    return cls()


def by_name(name: str) -> Family:
    """Returns the family of this name. Raises UserError if there is none."""
    return _of_class(FAMILIES.get(name))


def known() -> list[Family]:
    """Returns all families."""
    return [by_name(name) for name in FAMILIES.names]


def by_pipeline(name: object) -> Family | None:
    """Returns the family of a pipeline's class, as model_index.json names it; None if it is not a known family's."""
    return next((family for family in known() if family.pipeline == name), None)


def of_folder(folder: Path) -> Family:
    """Returns the family of the base in a diffusers folder; the default one if model_index.json names no known one.

    Raises:
        UserError: model_index.json is missing or not JSON.
    """
    index = LibraryConfig.read(folder / "model_index.json")
    return by_pipeline(index.get("_class_name")) or by_name(DEFAULT_FAMILY)


def of_network(config: LibraryConfig) -> Family:
    """Returns the family of a network by its configuration; the default one if none recognises it."""
    return next((family for family in known() if family.recognises(config)), None) or by_name(DEFAULT_FAMILY)


def of_tensors(names: Iterable[str]) -> Family:
    """Returns the family of a checkpoint in one file, by its text encoders' tensors; the default one without any."""
    names = list(names)
    for family in known():
        if (file := family.single_file) and any(name.startswith(file.text) for name in names):
            return family
    return by_name(DEFAULT_FAMILY)


def network_dtype(network: nn.Module) -> torch.dtype:
    """Returns the precision of a network, after `refresh` of its adapted layers.

    A network's own `dtype` walks through all its modules, which takes the host 21 ms for SDXL.
    """
    refresh(network)
    return next(network.parameters()).dtype
