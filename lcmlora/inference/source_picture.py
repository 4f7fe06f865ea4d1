"""A picture that drawing starts from, of any size, and the part of it that is drawn anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from lcmlora.errors import UserError
from lcmlora.io.parsing import read_bytes

if TYPE_CHECKING:
    from torch import Tensor

STRENGTH = 0.8  # if none is given, as in diffusers' pipelines


@dataclass(frozen=True)
class SourcePicture:
    """A picture to draw anew (img2img), or to draw a part of anew (inpainting).

    Its centre is cropped to the proportions of the picture to draw, and scaled to its size.

    picture: RGB.
    strength: in (0, 1]. Drawing starts at this share of the noise: 1 leaves next to nothing of the picture.
    mask: of the picture's size, white where the picture is drawn anew, and black where it is kept; None draws all of it
        anew. What is kept goes through the VAE, so its pixels change a little.
    """

    picture: Image.Image
    strength: float = STRENGTH
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.size != self.picture.size:
            (width, height), (across, down) = self.picture.size, self.mask.size
            raise UserError(f"mask: expected {width} x {height} pixels, the size of the picture, got {across} x {down}")

    def pixels(self, height: int, width: int) -> Tensor:
        """Returns the picture in this size, (1, 3, height, width) fp32 in [-1, 1]."""
        import numpy as np
        import torch

        fitted = fit(self.picture.convert("RGB"), height, width)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).unsqueeze(0).float().div(127.5).sub(1)

    def black_and_white(self, height: int, width: int) -> Image.Image | None:
        """Returns the mask in this size, 0 and 255; None if there is none."""
        if self.mask is None:
            return None
        return fit(self.mask.convert("L"), height, width).point(lambda value: 255 * (value > 127))

    def mask_of_latents(self, height: int, width: int, factor: int) -> Tensor | None:
        """Returns the mask of the latents of a picture of this size, (1, 1, h, w) fp32 of 0 and 1; None if there is
        none.

        Args:
            factor: pixels in a row for one of the latents. The upper left one of them decides, as in diffusers.
        """
        import numpy as np
        import torch

        mask = self.black_and_white(height, width)
        if mask is None:
            return None
        return torch.from_numpy(np.array(mask))[None, None, ::factor, ::factor].float().div(255)


def read_source(picture: Path, strength: float, mask: Path | None = None) -> SourcePicture:
    """Returns the picture and the mask in these files. Raises UserError if one of them cannot be read."""
    return SourcePicture(_read(picture), strength, None if mask is None else _read(mask))


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Returns the centre of a picture, of these proportions and in this size."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _read(path: Path) -> Image.Image:
    from lcmlora.data import decoding
    from lcmlora.data.reading.candidates import Unusable

    try:
        return decoding.decode(read_bytes(path))[0]
    except Unusable as error:
        raise UserError(f"{path}: {error}") from None
