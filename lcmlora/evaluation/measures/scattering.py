"""Features without a trained network: wavelet scattering, and the layout of colours. They see a picture at full size.

A trained network that resizes its pictures is blind to what the resizing removes: blur, noise, ringing. These features
are fixed filters on every pixel, so that they are a second view which shares neither weights nor training data with
the first. What they do not see is what a picture shows.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lcmlora.errors import UserError

_OCTAVES = 4  # scales, each of half the frequency of the one before, from the finest that pixels have
_ANGLES = 4  # orientations of the wavelets, 45 degrees apart
_LAYOUT = 4  # the picture's colours on this many rows and columns
# Of the Morlet wavelets:
_WAVE = 3 * math.pi / 4  # radians a pixel
_WIDTH = 0.9  # standard deviation, in pixels
_REACH = 3  # pixels
_FAINT = 1 / 510  # half a step of a byte: contrasts below it are rounding


class Scattering:
    """The wavelet scattering transform of two orders (Bruna and Mallat, arXiv 1203.1513), in logarithms.

    192 numbers: how strong each scale and orientation is in the luminance (first order, 16) and in two colour
    differences (32), how these strengths vary over the picture at coarser scales (second order as a share of the
    first, 96), and the mean colours of 4 x 4 cells (48). Every filter runs on the full-sized picture; an octave is
    reached by halving what the finer one left.
    """

    distance: ClassVar[str] = "frechet"
    name = "scattering/192@full-size"
    dimensions = _OCTAVES * _ANGLES * 3 + math.comb(_OCTAVES, 2) * _ANGLES**2 + 3 * _LAYOUT**2

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        if source is not None:
            raise UserError(f"evaluation: scattering features have no weights; remove {source}")
        self._device = device
        self._wavelets = _wavelets().to(device)
        self._halving = _halving().to(device)
        self._colours = torch.tensor([[0.299, 0.587, 0.114], [-0.299, -0.587, 0.886], [0.701, -0.587, -0.114]])
        self._colours = self._colours.to(device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        rgb = pictures.to(self._device, torch.float32)
        planes = torch.einsum("oc,bchw->bohw", self._colours, rgb)  # luminance, blue and red less luminance
        first: list[Tensor] = []
        second: list[Tensor] = []
        moduli: list[Tensor] = []  # of the luminance at finer octaves, each (B, angles, h, w) at the current size
        for octave in range(_OCTAVES):
            strengths = self._moduli(planes)  # (B, 3 * angles, h, w)
            for finer, mean in zip(moduli, first[:octave], strict=True):
                varied = self._moduli(finer).mean(dim=(2, 3)).unflatten(1, (_ANGLES, _ANGLES))
                second.append((_log(varied) - _log(mean[:, :_ANGLES, None])).flatten(1))
            first.append(strengths.mean(dim=(2, 3)))
            moduli = [self._halved(each) for each in (*moduli, strengths[:, :_ANGLES])]
            planes = self._halved(planes)
        layout = F.adaptive_avg_pool2d(rgb, _LAYOUT).flatten(1)
        return torch.cat([*map(_log, first), *second, layout], dim=1)

    def _moduli(self, planes: Tensor) -> Tensor:
        """Planes (B, C, h, w) -> the moduli of their wavelet coefficients (B, C * angles, h, w)."""
        batch, channels = planes.shape[:2]
        padded = F.pad(planes.flatten(0, 1)[:, None], (_REACH,) * 4, mode="replicate")
        waves = F.conv2d(padded, self._wavelets)  # real parts, then imaginary ones
        real, imaginary = waves.chunk(2, dim=1)
        return torch.hypot(real, imaginary).unflatten(0, (batch, channels)).flatten(1, 2)

    def _halved(self, planes: Tensor) -> Tensor:
        batch, channels = planes.shape[:2]
        padded = F.pad(planes.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
        return F.conv2d(padded, self._halving, stride=2).unflatten(0, (batch, channels))[:, :, 0]


def _log(strengths: Tensor) -> Tensor:
    return (strengths + _FAINT).log()


def _wavelets() -> Tensor:
    """Returns Morlet wavelets of all angles, (2 * angles, 1, k, k): real parts, then imaginary ones.

    Each has the mean zero, so that a flat surface has no strength, and moduli that sum to one, so that a strength is
    in the units of the pixels.
    """
    side = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64)
    y, x = torch.meshgrid(side, side, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * _WIDTH**2))
    kernels = []
    for n in range(_ANGLES):
        angle = math.pi * n / _ANGLES
        wave = torch.exp(1j * _WAVE * (x * math.cos(angle) + y * math.sin(angle)))
        kernel = window * (wave - (window * wave).sum() / window.sum())
        kernels.append(kernel / kernel.abs().sum())
    stacked = torch.stack(kernels)
    return torch.cat([stacked.real, stacked.imag]).float()[:, None]


def _halving() -> Tensor:
    """Returns the binomial filter before every second pixel is taken, (1, 1, 5, 5) (Burt and Adelson, 1983)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return torch.outer(row, row)[None, None]
