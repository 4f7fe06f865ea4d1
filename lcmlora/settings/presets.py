"""Families of bases with their settings, the published bases, and the recognition of a base's family.

A base gets the settings of its family: of the one that it names (`like`), of the published base whose name or hub id it
has, or of the one whose UNet has the same width.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject, as_object, parse_yaml, read_json
from lcmlora.io.terminal import shown

# A layer of a single file's UNet that reads the text embeddings; its weight is as wide as they are.
_UNET_TEXT = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight")


@dataclass(frozen=True)
class FamilySettings:
    """The settings that the size of a base decides."""

    name: str
    title: str
    unet: JsonObject  # keys of unet/config.json that identify the family
    resolution: int
    sections: dict[str, JsonObject]  # by the name of the section: encode, distill, evaluation, style, finetune


@dataclass(frozen=True)
class Presets:
    """All of presets.yaml."""

    families: dict[str, FamilySettings]
    bases: dict[str, JsonObject]


@functools.cache
def load() -> Presets:
    """Returns the presets that come with the package."""
    text = resources.files("lcmlora.settings").joinpath("presets.yaml").read_text(encoding="utf-8")
    raw = parse_yaml(text)
    families = {}
    for name, entry in raw["families"].items():
        named = {key: entry.pop(key) for key in ("title", "unet", "resolution")}
        families[name] = FamilySettings(name=name, sections=entry, **named)
    return Presets(families, raw["bases"])


def family(name: str | None) -> FamilySettings | None:
    """Returns the family of this name."""
    return None if name is None else load().families[name]


@dataclass(frozen=True)
class Completed:
    """An entry of `bases`, completed by presets and by the base's own files."""

    values: JsonObject
    origins: dict[str, str] = field(default_factory=dict)  # of the keys that the person did not write


def complete(name: str, entry: JsonObject, sources: Path = Path()) -> Completed:
    """Returns an entry of `bases`, completed by presets and by the base's own files.

    Args:
        sources: the folder that relative paths are relative to.

    Raises:
        UserError: `like` is no family or another one's, or neither presets nor files tell the resolution.
    """
    known = load().bases
    values, origins = dict(entry), {}

    def fill(more: JsonObject, origin: str) -> None:
        for key, value in more.items():
            if key not in values:
                values[key], origins[key] = value, origin

    if "source" not in entry and name in known:
        fill(known[name], f"preset {name}")
    for preset, base in known.items():
        if values.get("source") == base["source"]:
            # Of another revision the variant may be another, too.
            fill(base if "revision" not in values else {"like": base["like"]}, f"preset {preset}")
    like = values.get("like")
    if like is not None and like not in load().families:
        if not isinstance(like, str) or like not in known:
            raise UserError(f"like: got {shown(repr(like), 80)}: expected one of {', '.join(load().families)}")
        values["like"] = like = known[like]["like"]
    if _is_path(values.get("source"), sources):
        try:
            unet, file = _unet_config(values, sources)
            resolution = _resolution(file, unet)
        except UserError:
            # `fetch` names faults of the files, and `explain_unknown_family` is asked if settings are missing.
            pass
        else:
            found = recognise_family(unet)
            fill({"like": found.name} if found else {}, str(file))
            fill({"resolution": resolution} if resolution else {}, str(file))
            if found and like is not None and found.name != like:
                raise UserError(f"like: {like}, and {file} is of {found.name}; write `like: {found.name}`")
    if values.get("like") is not None:
        fill({"resolution": load().families[values["like"]].resolution}, f"preset {values['like']}")
    if "resolution" not in values and "source" in values:
        reason = explain_unknown_family(values, sources)
        raise UserError(f"{reason}; or write `resolution` in pixels, and the batches of each section")
    return Completed(values, origins)


def explain_unknown_family(values: JsonObject, sources: Path = Path()) -> str:
    """Returns why the family of a base is not known, and what to write."""
    families = " or ".join(f"`like: {name}`" for name in load().families)
    try:
        why = f"{shown(str(values.get('source')), 200)} is none of the published bases"
        if _is_path(values.get("source"), sources):
            _, file = _unet_config(values, sources)
            why = f"{file} has the width of no known family"
    except UserError as error:
        why = str(error)
    return f"its family is not known ({why}); write {families}, whose settings it then gets"


def recognise_family(unet: JsonObject) -> FamilySettings | None:
    """Returns the family whose UNet has this configuration."""
    for found in load().families.values():
        if all(unet.get(key) == value for key, value in found.unet.items()):
            return found
    return None


def _resolution(file: Path, unet: JsonObject) -> int | None:
    """Returns the pixels for which a folder's UNet was made; None if its configuration does not say so.

    Raises:
        UserError: the configuration of the VAE is missing or damaged.
    """
    size = unet.get("sample_size")
    if not isinstance(size, int):
        return None
    vae = file.parent.parent / "vae" / "config.json"
    levels = as_object(read_json(vae), str(vae)).get("block_out_channels")
    return size * 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None


def _is_path(source: Any, sources: Path) -> bool:
    return isinstance(source, str) and (source.endswith(".safetensors") or (sources / source).is_dir())


def _unet_config(values: JsonObject, sources: Path) -> tuple[JsonObject, Path]:
    """Returns the known keys of the UNet's configuration, read without torch, and the file that has them.

    Raises:
        UserError: the file is missing or damaged.
    """
    source, config = sources / values["source"], values.get("config")
    if source.suffix == ".safetensors":
        if isinstance(config, str) and (sources / config).is_dir():
            source = sources / config
        elif isinstance(config, str):
            like = next((base["like"] for base in load().bases.values() if base["source"] == config), None)
            found = family(like)
            return (dict(found.unet) if found else _unet_config_of_weights(source)), source
        else:
            return _unet_config_of_weights(source), source
    path = source / "unet" / "config.json"
    return as_object(read_json(path), str(path)), path


def _unet_config_of_weights(path: Path) -> JsonObject:
    """Returns the keys of a UNet's configuration that follow from the header of a single file with its weights."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            attention = next((name for name in names if _UNET_TEXT.fullmatch(name)), None)
            if attention is None:
                return {}
            width = next(reversed(file.get_slice(attention).get_shape()), None)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    sdxl = any(name.startswith("conditioner.embedders.1.") for name in names)
    return {"cross_attention_dim": width} | ({"addition_embed_type": "text_time"} if sdxl else {})
