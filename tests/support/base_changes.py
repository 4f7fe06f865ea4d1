"""Changes of a base's folder, for tests of its examination: damage, and other forms of the same base.

A `Change` is applied to the folder of a base; the functions with a `Change` as their result make one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lcmlora.config import Base
from tests.support.miniature import RESOLUTION

Change = Callable[[Path], Any]
TensorsChange = Callable[[dict[str, torch.Tensor]], Any]

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT, TEXT_2 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
INDEX, TOKENIZER, TOKENIZER_CONFIG = "model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
SECOND_SHARD = "diffusion_pytorch_model-00002-of-*.safetensors"
SHARDS = "diffusion_pytorch_model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"


def settings_of(source: Path, **changes: object) -> Base:
    """Returns the settings of a miniature base."""
    return Base.model_validate({"source": str(source), "resolution": RESOLUTION, "license": "mit"} | changes)


def set_keys(file: str, **changes: object) -> Change:
    """Sets keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def remove(*paths: str) -> Change:
    """Removes files or folders."""

    def change(folder: Path) -> None:
        for path in paths:
            shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


def write(file: str, content: bytes) -> Change:
    """Writes a file."""
    return lambda folder: (folder / file).write_bytes(content) and None


def cut(file: str, bytes_less: int) -> Change:
    """Cuts bytes off the end of a file."""
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - bytes_less)


def change_tensors(file: str, change: TensorsChange) -> Change:
    """Changes the tensors of a file."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return apply


def set_last_number(value: float) -> TensorsChange:
    """Sets the last number of the last tensor."""
    return lambda tensors: tensors[max(tensors)].view(-1)[-1:].fill_(value)


def cast(dtype: torch.dtype) -> TensorsChange:
    """Converts all tensors."""
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def split_vocabulary(folder: Path, part: str = "tokenizer") -> None:
    """Writes vocab.json and merges.txt instead of tokenizer.json, as transformers before 5 does."""
    model = json.loads((folder / part / "tokenizer.json").read_text())["model"]
    (folder / part / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / part / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / part / "tokenizer.json").unlink()


def split_vocabulary_without(*files: str) -> Change:
    """Writes vocab.json and merges.txt instead of tokenizer.json, and removes some of these files."""

    def change(folder: Path) -> None:
        split_vocabulary(folder)
        remove(*(f"tokenizer/{file}" for file in files))(folder)

    return change


def change_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes the model in tokenizer.json."""

    def apply(folder: Path) -> None:
        tokenizer = json.loads((folder / TOKENIZER).read_text())
        change(tokenizer["model"])
        (folder / TOKENIZER).write_text(json.dumps(tokenizer))

    return apply


def pickle_part(part: str) -> Change:
    """Writes the weights of a part as a pickle that makes the folder `unpickled` if it is read."""

    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("unpickled",)

    def change(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        stem = "pytorch_model" if file.name.startswith("model") else "diffusion_pytorch_model"
        file.unlink()
        torch.save(Mark(), folder / part / f"{stem}.bin")

    return change


def split_unet(folder: Path, variant: str | None = None) -> None:
    """Writes the UNet's weights in shards."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="100KB", variant=variant)


def change_shards(change: Change) -> Change:
    """Writes the UNet's weights in shards, and changes the UNet's folder."""

    def apply(folder: Path) -> None:
        split_unet(folder)
        change(folder / "unet")

    return apply


def change_weight_map(change: Callable[[dict[str, str]], Any]) -> Change:
    """Changes the index of shards in the UNet's folder."""

    def apply(unet: Path) -> None:
        index = json.loads((unet / SHARDS).read_text())
        change(index["weight_map"])
        (unet / SHARDS).write_text(json.dumps(index))

    return apply


def break_link(file: str) -> Change:
    """Makes a file a link to nothing, as in a hub's cache without the blob."""

    def apply(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("/nowhere/blobs/0123")

    return apply


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    """Changes the last tensor."""
    tensors[max(tensors)] += 1
