"""What each stage of a model takes of a GPU: bytes of tensors and operations, counted from the base's architecture.

The network, its VAE and the adapter are built on torch's meta device, where they have shapes and no numbers. So nothing
is downloaded and nothing is computed, and SDXL takes seconds on a laptop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcmlora.adapters import lora
from lcmlora.bases import families
from lcmlora.bases.description import network_config
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.bases.families.family import Conditioning
from lcmlora.config import Base, Distill
from lcmlora.doctor.counter import Counter, counting, empty
from lcmlora.errors import UserError
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.patches.torch_internals import run_backward
from lcmlora.training.execution import pick_checkpointing, recompute

_FP32 = 4  # bytes

# Copies of the adapter in fp32 besides its weights, their average and the gradients: what the optimizer keeps.
_MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0, "schedule-free": 2.0}


@dataclass(frozen=True)
class Use:
    """What a piece of work takes: bytes of tensors at the peak, and operations (multiplications and additions)."""

    peak: int
    operations: float


@dataclass(frozen=True)
class StepUse:
    """The phases of an optimizer step on this many rows at a time, each with the weights that are alive in it."""

    teacher: Use  # guided, two rows for each
    target: Use
    student: Use  # forward and backward
    update: int  # bytes while the optimizer updates

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(self.teacher.peak, self.target.peak, self.student.peak, self.update)

    @property
    def operations(self) -> float:
        """Operations of the forwards and the backward pass."""
        return self.teacher.operations + self.target.operations + self.student.operations


class MetaBase:
    """A base on the meta device. What it has counted once it keeps; nothing in it has the size of a model.

    Args:
        folder: of the base; it need not be there.
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: neither the folder nor lcmlora/architectures.json has its configuration, or no network can be built.
    """

    def __init__(self, name: str, base: Base, folder: Path, sources: Path = Path()) -> None:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        self.name, self.base = name, base
        self.config = network_config(base, folder, sources)
        self.family = families.of_network(self.config)
        self.family.check_network(self.config)
        self._places = [folder, sources / base.source, *([sources / base.config] if base.config else [])]
        text = self._file(f"{self.family.text_encoders[0].folder}/config.json")
        tokens = LibraryConfig.read(text).integer("max_position_embeddings", 77) if text else None
        self._inputs = self.family.input_shapes(self.config, tokens)

    @cached_property
    def parameters(self) -> int:
        """The network's parameters."""
        return sum(p.numel() for p in self._built(torch.float32).parameters())

    @cached_property
    def vae_config(self) -> LibraryConfig:
        """The VAE's configuration: of the base's folder, or else the one that its family shares."""
        found = self._file(f"{self.family.vae.folder}/config.json")
        return self.family.usual_vae() if found is None else LibraryConfig.read(found)

    @cached_property
    def text_parameters(self) -> int:
        """The text encoders' parameters: of the base's folder, or else those that its family shares."""
        for place in self._places:
            if all((place / part.folder / "config.json").is_file() for part in self.family.text_encoders):
                shapes = (self.family.shapes(place, part) for part in self.family.text_encoders)
                return sum(torch.Size(shape).numel() for each in shapes for shape in each.values())
        return self.family.usual_text_parameters(self.config)

    @cached_property
    def vae_parameters(self) -> int:
        """The VAE's parameters."""
        return sum(p.numel() for p in self._vae(torch.float32).parameters())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of the base's resolution."""
        side = self.base.resolution // self.family.latent_factor(self.vae_config)
        return (self.family.latent_channels(self.vae_config), side, side)

    @property
    def caption_numbers(self) -> int:
        """Numbers in the embeddings of a caption, as the cache keeps them."""
        own = self.family.micro_conditioning(*(torch.zeros(1, 2) for _ in range(3)))
        return sum(torch.Size(shape).numel() for name, shape in self._inputs.items() if name not in own)

    def _file(self, name: str) -> Path | None:
        """Returns a file of the base, or of what it is made of; None if it is not here."""
        return next((place / name for place in self._places if (place / name).is_file()), None)

    def _built(self, dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            try:
                network = self.family.build(self.config)
            except Exception as error:  # of a foreign configuration, whatever it leads to
                raise UserError(f"{self.config.place}: diffusers cannot build a network from it: {error}") from error
        return _frozen(network, dtype)

    @cache  # noqa: B019
    def _adapted(self, rank: int, alpha: float, dtype: torch.dtype) -> tuple[Any, dict[str, nn.Parameter]]:
        """Returns the network with an adapter as it is trained, and the adapter's parameters."""
        network = self._built(dtype)
        parameters = lora.inject(network, rank, alpha, 0, self.family.placement)
        LoraForwards().install(network)
        self.family.prepare(network)
        return network, parameters

    def adapter_parameters(self, settings: Distill) -> int:
        """Returns the number of the adapter's parameters."""
        return sum(p.numel() for p in self._adapted(settings.rank, settings.alpha, torch.bfloat16)[1].values())

    def training_bytes(self, settings: Distill) -> int:
        """Returns the bytes of an adapter in training: its weights, their average, and what the optimizer keeps."""
        return round((2 + _MOMENTS[settings.optimizer]) * _FP32 * self.adapter_parameters(settings))

    def _vae(self, dtype: torch.dtype) -> Any:
        import diffusers

        if dtype == torch.float16:  # as `Family.load` does
            dtype = torch.float32
        with torch.device("meta"):
            vae = getattr(diffusers, self.family.vae.classes[0]).from_config(self.vae_config)
        return _frozen(vae, dtype)

    def _rows(self, rows: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Returns latents, times and conditioning, as the family's forward takes them."""
        conditioning = {name: empty(rows, *shape) for name, shape in self._inputs.items()}
        return empty(rows, *self.latent_shape), empty(rows), conditioning

    def step(self, settings: Distill, rows: int, dtype: torch.dtype, *, checkpointing: str) -> StepUse:
        """Counts an optimizer step that takes so many pictures at a time.

        Args:
            settings: rank and optimizer count; batch and accumulate do not.
            dtype: of the base.
            checkpointing: none, selective or full.
        """
        return self._step(settings.rank, settings.alpha, settings.optimizer, rows, dtype, checkpointing)

    @cache  # noqa: B019
    def _step(
        self, rank: int, alpha: float, optimizer: str, rows: int, dtype: torch.dtype, checkpointing: str
    ) -> StepUse:
        network, parameters = self._adapted(rank, alpha, dtype)
        recompute(network, checkpointing)
        size = sum(p.numel() for p in parameters.values())
        average_and_moments = empty(size, dtype=torch.float32), empty(round(_MOMENTS[optimizer] * size))
        vae = self._vae(dtype)  # with which the first process draws validation pictures

        def student() -> None:
            run_backward(self.family.forward(network, *self._rows(rows)).sum())

        def forward(count: int) -> None:
            self.family.forward(network, *self._rows(count))

        held = [*_weights(network), *_weights(vae), *average_and_moments]
        with counting(held) as counter:
            with torch.no_grad():
                forward(1)  # what is derived from A and B once and kept from then on
                with lora.disabled(network):
                    teacher = _used(counter, lambda: forward(2 * rows))
                target = _used(counter, lambda: forward(rows))
            learned = _used(counter, student)
            update = counter.live + _FP32 * size  # and the gradients in one buffer
        for parameter in parameters.values():
            parameter.grad = None
        return StepUse(teacher, target, learned, update)

    @cache  # noqa: B019
    def drawing(self, rows: int, dtype: torch.dtype) -> Use:
        """Counts a guided network evaluation of so many pictures, with all parts in memory, and their decoding."""
        network, vae = self._built(dtype), self._vae(dtype)
        self.family.prepare(network)
        texts = empty(self.text_parameters, dtype=dtype)
        with counting([*_weights(network), *_weights(vae), texts]) as counter, torch.no_grad():
            guided = _used(counter, lambda: self.family.forward(network, *self._rows(2 * rows)))
            decoded = _used(counter, lambda: self.family.decode(vae, empty(rows, *self.latent_shape)))
        return Use(max(guided.peak, decoded.peak), guided.operations)

    @cache  # noqa: B019
    def encoding(self, rows: int, dtype: torch.dtype) -> Use:
        """Counts the encoding of so many pictures by the VAE, with the text encoders in memory."""
        vae, texts = self._vae(dtype), empty(self.text_parameters, dtype=dtype)
        pictures = empty(rows, 3, self.base.resolution, self.base.resolution)
        with counting([*_weights(vae), texts]) as counter, torch.no_grad():
            return _used(counter, lambda: self.family.encode_pictures(vae, pictures))

    def decoding_operations(self, dtype: torch.dtype) -> float:
        """Counts the operations of decoding one picture."""
        vae = self._vae(dtype)
        with counting() as counter, torch.no_grad():
            return _used(counter, lambda: self.family.decode(vae, empty(1, *self.latent_shape))).operations

    def evaluation(self) -> float:
        """Counts the operations of one network evaluation for one picture, F0."""
        network = self._built(torch.bfloat16)
        with counting() as counter, torch.no_grad():
            return _used(counter, lambda: self.family.forward(network, *self._rows(1))).operations


def _frozen(module: Any, dtype: torch.dtype) -> Any:
    for parameter in module.parameters():  # `module.to` would warn that some modules may want fp32
        parameter.data = parameter.data.to(dtype)
    return module.eval().requires_grad_(False)


def _weights(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _used(counter: Counter, work: Callable[[], object]) -> Use:
    counter.restart()
    work()
    return Use(counter.peak, counter.operations)


def levels(settings: Distill) -> list[str]:
    """Returns the modes of recomputing activations that may be advised, the chosen one of a GPU first."""
    modes = ["none", "selective", "full"]  # from the most memory to the least
    return modes[modes.index(pick_checkpointing(settings.checkpointing, torch.device("cuda"))) :]
