"""CLIP models in transformers' layout, from the hub or a folder: what features and scores read of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.io.parsing import as_object, read_json
from lcmlora.patches import bars

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the older repositories have the second only
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_SIZES = {(768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1664, 48): "bigG"}  # width and layers of the picture tower


def find(source: str, setting: str) -> Path:
    """Returns the folder of the model; a hub id, `OWNER/NAME@COMMIT`, is downloaded to the hub's cache.

    Args:
        setting: what to name in errors.

    Raises:
        UserError: neither a folder nor a hub id with its commit, a hub that does not answer, or missing files.
    """
    folder = Path(source)
    if not folder.is_dir():
        place, _, revision = source.partition("@")
        if place.startswith((".", "/")) or place.count("/") != 1 or not revision:
            raise UserError(f"{setting}: {source} is no folder, and no hub id with its commit (OWNER/NAME@COMMIT)")
        for weights in _WEIGHTS:  # one after the other: a repository with both has everything twice
            folder = download(place, revision, ["*.json", "*.txt", weights], setting)
            if (folder / weights).is_file():
                break
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{setting}: {folder} has no {name}; a CLIP model in transformers' layout has one")
    _weights(folder)
    return folder


def download(place: str, revision: str, files: list[str], setting: str) -> Path:
    """Returns the folder in the hub's cache that has these files (patterns) of a repository at a commit.

    Raises:
        UserError: the hub does not answer, or does not know the repository or the commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{setting}: cannot download {place} at {revision}, set it to a local copy: {reason}"
        ) from error


def _weights(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has no weights ({' or '.join(_WEIGHTS)})")


class Clip:
    """A CLIP model, frozen, in fp32: pictures and texts -> unit vectors of one space (arXiv 2103.00020)."""

    def __init__(self, source: str, setting: str, device: torch.device) -> None:
        """Loads the model of `find`'s folder. Raises UserError where that is of something else."""
        from transformers import CLIPModel

        folder = find(source, setting)
        try:
            with bars.hidden():
                model, report = CLIPModel.from_pretrained(
                    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: is not a CLIP model: {' '.join(str(error).split())}") from error
        if report["missing_keys"]:
            raise UserError(f"{folder}: is not a CLIP model: it has no {min(report['missing_keys'])}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.dimensions: int = model.config.projection_dim
        self._folder, self._device = folder, device
        path = folder / "preprocessor_config.json"
        processor = as_object(read_json(path), str(path))
        try:
            self._mean, self._deviation = (
                torch.tensor(processor[name], device=device, dtype=torch.float32).view(3, 1, 1)
                for name in ("image_mean", "image_std")
            )
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{path}: expected image_mean and image_std, three numbers each") from None

    @property
    def name(self) -> str:
        """What it is and with which weights, wherever they came from: `ViT-L-14-336@` and the digest's beginning."""
        vision = self.model.config.vision_config
        shape = (vision.hidden_size, vision.num_hidden_layers)
        size = _SIZES.get(shape, "x".join(map(str, shape)))
        return f"ViT-{size}-{vision.patch_size}-{vision.image_size}@{sha256_file(_weights(self._folder))[:12]}"

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> (B, dimensions).

        They are resized to the model's own square (bicubic, antialiased) without a crop, which alone differs from
        transformers' processor and only where a picture is not square.
        """
        side = self.model.config.vision_config.image_size
        x = F.interpolate(pictures.to(self._device, torch.float32), (side, side), mode="bicubic", antialias=True)
        x = (x.clamp(0, 1) - self._mean) / self._deviation
        return F.normalize(self.model.visual_projection(self.model.vision_model(x).pooler_output), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, dimensions); what is longer than the model reads is cut off."""
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=1)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        # Where these are missing transformers makes a tokenizer without words, to which all texts are alike.
        if not any(all((self._folder / name).is_file() for name in names) for names in _TOKENIZERS):
            raise UserError(f"{self._folder}: has no tokenizer ({' or '.join(' and '.join(n) for n in _TOKENIZERS)})")
        return CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)
