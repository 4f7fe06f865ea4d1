"""What differs between kinds of bases, behind one class; a subclass for each kind, in a table by name.

The methods take the parts that they work with, so that a family holds nothing and one instance serves all bases.
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
from lcmlora.bases.examination.weightfiles import DIFFUSERS, json_of
from lcmlora.bases.schedule import Schedule
from lcmlora.patches.lora_forwards import refresh
from lcmlora.plugins import FAMILIES

COMMONEST = "sd"  # whose parts are asked for where nothing tells which family it is

# What a network is given besides latents and time, by name: a row for each latent.
Conditioning = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A part of a pipeline that draws: a folder in the base's, which model_index.json names."""

    folder: str
    classes: tuple[str, ...]  # that it may be of; the first is the usual one
    weights: str = ""  # what its files of weights are called; empty for a part without


@dataclass(frozen=True)
class SingleFile:
    """Where the tensors of a checkpoint in one file belong, by how their names begin."""

    network: tuple[str, ...]
    vae: tuple[str, ...]
    text: tuple[str, ...]
    text_encoders: dict[str, str]  # how those of each text encoder begin, by its folder


class Family(ABC):
    """A kind of base.

    name: in manifests of caches, and the key of the table.
    title: as messages call it.
    pipeline: diffusers' class, by which model_index.json names the kind.
    network, vae: those parts.
    text_encoders, tokenizers: in the order in which their embeddings are joined.
    placement: which layers an adapter changes, and how its file names them.
    single_file: None where the kind has no layout in one file.
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

    # --- its folder ---------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that draw, without the scheduler."""
        return (self.network, self.vae, *self.text_encoders, *self.tokenizers)

    def recognises(self, config: dict[str, Any]) -> bool:
        """Returns whether a network's configuration is of this kind."""
        return bool(config.get("_class_name") == self.network.classes[0])

    @abstractmethod
    def naming(self, config: dict[str, Any]) -> Naming:
        """Returns what other programs call a network of this configuration and its layers."""

    def digested(self, index: dict[str, Any]) -> dict[str, Any]:
        """Returns what of model_index.json decides what is drawn, as the base's digest has it."""
        return {"family": self.name}

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Raises UserError where the configurations in a base's folder do not fit one another."""

    @abstractmethod
    def examined_schedule(self, folder: Path) -> dict[str, Any]:
        """Returns what of a base's schedule decides what is drawn. Raises UserError where it can be no schedule."""

    @abstractmethod
    def examined_tokenizer(self, folder: Path, tokenizer: Part, encoder: Part) -> dict[str, Any]:
        """Returns what a tokenizer makes of text. Raises UserError where it does not fit the encoder that reads it."""

    @abstractmethod
    def shapes(self, folder: Path, part: Part) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a part's weights by its configuration."""

    @abstractmethod
    def check_network(self, path: Path, config: dict[str, Any]) -> None:
        """Raises UserError where this configuration is not that of a network that can be distilled.

        Args:
            path: its file, for messages.
        """

    @abstractmethod
    def size_unit(self, folder: Path) -> int:
        """Returns what the sides of a picture must be multiples of, in pixels."""

    def native_resolution(self, config: dict[str, Any], vae: dict[str, Any]) -> int | None:
        """Returns the side in pixels of the pictures that the network was made for; None where it does not tell.

        Args:
            config, vae: the configurations of network and VAE; the latter may be empty.
        """
        size = config.get("sample_size")
        return size * self.latent_factor(vae) if isinstance(size, int) else None

    # --- loading ------------------------------------------------------------------------------------------------

    def build(self, config: dict[str, Any]) -> nn.Module:
        """Returns a network of this configuration without its weights, on torch's default device."""
        import diffusers

        network: nn.Module = getattr(diffusers, self.network.classes[0]).from_config(config)
        return network

    def load(self, part: Part, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        """Returns a part with weights, loaded from the base's folder. Raises what the libraries raise."""
        import diffusers
        import transformers

        of_text = part in self.text_encoders
        cls = getattr(transformers if of_text else diffusers, part.classes[0])
        options = {"dtype": dtype} if of_text else {"torch_dtype": dtype}
        return cls.from_pretrained(folder, subfolder=part.folder, variant=variant, use_safetensors=True, **options)

    def prepare(self, network: Any) -> None:
        """Changes how a network that was loaded computes, on its device; nothing by default."""
        del network

    def load_tokenizer(self, part: Part, folder: Path) -> Any:
        """Returns a tokenizer."""
        import transformers

        return getattr(transformers, part.classes[0]).from_pretrained(folder / part.folder)

    @abstractmethod
    def schedule(self, folder: Path, resolution: int) -> tuple[Schedule, dict[str, Any]]:
        """Returns the noise schedule and diffusers' configuration of it, from which other schedulers are made.

        Args:
            resolution: of pictures in pixels, by which some kinds shift their noise levels.
        """

    # --- the network --------------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, network: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's raw output (B, C, h, w) fp32, computed in its own precision.

        Args:
            latents: (B, C, h, w) fp32.
            time: (B,), what the schedule tells the network.
            conditioning: a row for each latent, `micro_conditioning` included.
        """

    def micro_conditioning(self, sizes: Tensor, crops: Tensor, targets: Tensor) -> Conditioning:
        """Returns what the network is told of a picture besides its caption, fp32; nothing by default.

        Args:
            sizes: (B, 2) of the original, height before width, in pixels.
            crops: (B, 2), top before left.
            targets: (B, 2) of the picture that is trained on or drawn.
        """
        return {}

    # --- text ---------------------------------------------------------------------------------------------------

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
        """Returns the conditioning of captions, fp32, of their token ids (B, T) for each text encoder."""

    def empty_is_zeros(self, index: dict[str, Any]) -> bool:
        """Returns whether the unconditional embedding is zeros, and not that of the empty prompt.

        Args:
            index: model_index.json.
        """
        return False

    # --- latents ------------------------------------------------------------------------------------------------

    def latent_factor(self, vae: dict[str, Any]) -> int:
        """Returns how many pixels a latent's pixel has on a side, by the VAE's configuration."""
        blocks = vae.get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 16 else 8

    def latent_channels(self, vae: dict[str, Any]) -> int:
        """Returns how many channels a diffusion-ready latent has."""
        return int(vae["latent_channels"])

    def latent_scale(self, vae: dict[str, Any]) -> float:
        """Returns what the VAE's latents are multiplied with, by its configuration."""
        return float(vae.get("scaling_factor", 0.18215))

    def latent_shift(self, vae: dict[str, Any]) -> float:
        """Returns what is taken from the VAE's latents before that."""
        return float(vae.get("shift_factor") or 0.0)

    def encode_pictures(self, vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the diffusion-ready latent, both (B, C, h, w) fp32."""
        posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
        scale = torch.tensor(self.latent_scale(vae.config))
        mean = posterior.mean.float() - self.latent_shift(vae.config)
        return mean * scale, posterior.logvar.float() + 2 * scale.log()

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Diffusion-ready latents (B, C, h, w) -> pictures (B, 3, H, W) fp32 in [0, 1]."""
        unscaled = latents / self.latent_scale(vae.config) + self.latent_shift(vae.config)
        return vae.decode(unscaled.to(vae.dtype)).sample.float().div(2).add(0.5).clamp(0, 1)


@cache
def _of_class(cls: type[Family]) -> Family:
    return cls()


def by_name(name: str) -> Family:
    """Returns the family of this name. Raises UserError where there is none."""
    return _of_class(FAMILIES.get(name))


def known() -> list[Family]:
    """Returns all families."""
    return [by_name(name) for name in FAMILIES.names]


def by_pipeline(name: object) -> Family | None:
    """Returns the family of a pipeline's class, as model_index.json names it."""
    return next((family for family in known() if family.pipeline == name), None)


def of_folder(folder: Path) -> Family:
    """Returns the family of the base in a diffusers folder; the commonest where model_index.json names no known one.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    return by_pipeline(json_of(folder / "model_index.json").get("_class_name")) or by_name(COMMONEST)


def of_network(config: dict[str, Any]) -> Family:
    """Returns the family of a network by its configuration; the commonest where none recognises it."""
    return next((family for family in known() if family.recognises(config)), None) or by_name(COMMONEST)


def of_tensors(names: Iterable[str]) -> Family:
    """Returns the family of a checkpoint in one file by its text encoders' tensors; the commonest where it has none."""
    names = list(names)
    for family in known():
        if (file := family.single_file) and any(name.startswith(file.text) for name in names):
            return family
    return by_name(COMMONEST)


def network_dtype(network: nn.Module) -> torch.dtype:
    """Returns the precision of a network, and brings what its adapted layers compute with up to date.

    A network's own `dtype` walks through all its modules: 21 ms of SDXL's host.
    """
    refresh(network)
    return next(network.parameters()).dtype
