"""A base examined: every part there, whole, finite and fitting the others. And the digests that name it for good.

Reading all weights takes seconds for each gigabyte, so the result is kept, with size, times and inode of every file
that it is about; while these are the same, nothing is read again. `fetch` keeps it beside the base's folder, in
`.examined/`. For a folder that was never fetched there is no such place, or it cannot be written: then each process
reads the base once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lcmlora.bases import families
from lcmlora.bases.examination import structure
from lcmlora.bases.examination.weightfiles import SHORT, Entry, find, json_of, read
from lcmlora.bases.families.family import Family, Part
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file, write_json
from lcmlora.io.parsing import Malformed, parse_json

RECORDS = ".examined"  # beside the bases' folders
_VERSION = 1  # of what is examined; a record of another version is made anew

# Parts that play no part in drawing as it is done here, and that a download leaves out.
_IDLE = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
_KINDS = {
    "Inpaint": "this one is for inpainting",
    "Img2Img": "this one goes from picture to picture, as SDXL's refiner does",
    "Pix2Pix": "this one is for editing",
    "Upscale": "this one is an upscaler",
    "Depth2Img": "this one wants depth maps",
    "ControlNet": "this one wants control pictures",
    "LatentConsistency": "this one is distilled already",
}
# What the libraries write into a configuration of themselves; another version of them is no other base.
_BOOKKEEPING = ("transformers_version", "torch_dtype", "dtype", "architectures")

Stamp = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True)
class Examination:
    """What an examined base is."""

    digest: str  # of all that draws: UNet, VAE, text encoders, tokenizers, schedule
    unet: str  # of the files of its UNet alone, by which releases before 2026-11 name their base
    dtypes: dict[str, str]  # of the weights, by part: fp32, fp16, bf16, or several as fp16+fp32

    def __str__(self) -> str:
        told = ", ".join(f"{part} {dtype}" for part, dtype in self.dtypes.items())
        return f"{told}; digest {self.digest[:12]}"


def examine(name: str, folder: Path, variant: str | None = None) -> Examination:
    """Returns what the base in a diffusers folder is, from the record of an earlier call while no file has changed.

    Args:
        name: of the base, for messages about its keys in params.yaml.
        variant: in which its weights are loaded, such as fp16.

    Raises:
        UserError: the first fault, and in which parts there are others.
    """
    try:
        return _known_or_examined(name, folder, variant)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


def _known_or_examined(name: str, folder: Path, variant: str | None) -> Examination:
    check_parts(folder)
    stamp = _stamp(folder)
    record = folder.parent / RECORDS / f"{folder.name}.json"
    wanted = {"version": _VERSION, "folder": str(folder.resolve()), "variant": variant}
    wanted["files"] = [list(each) for each in stamp]
    if (kept := _kept(record, wanted)) is not None:
        return kept
    found = _examined(name, folder, variant, folder.resolve(), stamp)
    if record.parent.is_dir() and os.access(record.parent, os.W_OK):
        write_json(record, wanted | {"found": asdict(found)})
    return found


def _kept(record: Path, wanted: dict[str, Any]) -> Examination | None:
    """Returns what a record holds, or None where it is about other files or is none of this version's."""
    if not record.is_file():
        return None
    try:
        value = parse_json(record.read_bytes())
    except Malformed:  # then it is made again
        return None
    if not isinstance(value, dict) or {key: value.get(key) for key in wanted} != wanted:
        return None
    found = value.get("found")
    return Examination(**found) if isinstance(found, dict) and found.keys() == {"digest", "unet", "dtypes"} else None


@lru_cache(maxsize=32)
def _examined(name: str, folder: Path, variant: str | None, place: Path, stamp: Stamp) -> Examination:
    """Examines once in a process what `place` and `stamp` tell to be the same."""
    faults: list[str] = []

    @contextmanager
    def noting() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            faults.append(str(error))

    pieces: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    hashes: dict[str, str] = {}
    index, family = _index(folder)
    pieces["index"] = _digest(family.digested(index))
    with noting():
        family.check(folder)
    with noting():
        pieces["schedule"] = _digest(family.examined_schedule(folder))
    # The small parts come first: what is wrong with them is told before gigabytes are read.
    for tokenizer, encoder in zip(family.tokenizers, family.text_encoders, strict=True) if not faults else ():
        with noting():
            pieces[tokenizer.folder] = _digest(family.examined_tokenizer(folder, tokenizer, encoder))
    files: dict[Part, list[Path]] = {}
    for part in (family.network, family.vae, *family.text_encoders) if not faults else ():
        with noting():
            files[part] = find(name, folder / part.folder, part.weights, variant)
    for part, paths in files.items() if not faults else ():
        place = folder / part.folder
        with noting():
            held, found = _weights(paths)
            hashes |= {str(path): sha256 for path, sha256 in zip(paths, found, strict=True)}
            structure.check_weights(place, family.shapes(folder, part), held, text=part in family.text_encoders)
            dtypes[part.folder] = "+".join(sorted({SHORT[e.dtype] for e in held.values() if e.dtype in SHORT}))
            pieces[part.folder] = _digest({"config": _configuration(place), "files": found})
    if faults:
        more = f" (and {len(faults) - 1} more faults; this one is told first)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    return Examination(_digest(pieces), _folder_digest(folder / family.network.folder, hashes), dtypes)


def check_parts(folder: Path) -> None:
    """Raises UserError where the folder is not a pipeline of a known family in diffusers' layout.

    Only names are looked at: what `examine` says first.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file; expected a diffusers folder, or a checkpoint that ends in .safetensors")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such base folder")
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"{folder}: a diffusers base needs {index.name}, and there is none{_other(folder)}")
    # Of another pipeline's folder it is told first what it lacks of the commonest.
    family = families.of_folder(folder)
    first = [family.network.folder, family.vae.folder, "scheduler"]
    first += [family.tokenizers[0].folder, family.text_encoders[0].folder]
    for part in first:
        needed = folder / part / "config.json" if part in first[:2] else folder / part
        if not needed.exists():
            missing = needed.relative_to(folder) if (folder / part).is_dir() else f"{part}/"
            raise UserError(f"{folder}: a diffusers base needs {missing}, and there is none{_other(folder)}")
    _index(folder)
    for each in family.parts:
        if each.folder not in first and not (folder / each.folder).is_dir():
            raise UserError(
                f"{folder}: model_index.json names {each.folder}, and there is no {each.folder}/; a base of "
                f"{family.title}'s family needs it: get the base again"
            )
    for part in first:
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: is no folder; get the base again")


def _other(folder: Path) -> str:
    """Returns what the folder seems to be instead."""
    if (folder / "transformer").is_dir():
        return ": its network is a transformer (as Flux, SD3 or PixArt), and Stable Diffusion and SDXL are distilled"
    if (folder / "snapshots").is_dir():
        return "; it is a repository in the hub's cache: name the folder of a commit below its snapshots/"
    if (inside := sorted(folder.glob("*/model_index.json"))) and not (folder / "model_index.json").exists():
        return f"; name {inside[0].parent}, which has one"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files and not (folder / "model_index.json").exists():
        return f"; if {files[0]} is the whole checkpoint, set source to that file"
    return ""


def family_of(folder: Path, index: dict[str, Any]) -> Family:
    """Returns the family that a base's model_index.json names.

    Raises:
        UserError: it is another pipeline's.
    """
    path = folder / "model_index.json"
    kind = index.get("_class_name")
    if index.get("requires_aesthetics_score"):
        raise UserError(f"{path}: requires_aesthetics_score is set: this is SDXL's refiner; expected the base model")
    if (family := families.by_pipeline(kind)) is None:
        why = next((f"; {told}" for word, told in _KINDS.items() if word in str(kind)), "")
        known = " or ".join(sorted(each.pipeline for each in families.known()))
        raise UserError(f"{path}: _class_name is {str(kind)[:100]!r}; expected {known}{why}")
    return family


def _named(index: dict[str, Any], part: str) -> bool:
    value = index.get(part)
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _index(folder: Path) -> tuple[dict[str, Any], Family]:
    """Returns model_index.json and its family. Raises UserError where it lacks a part of that, or has others."""
    path = folder / "model_index.json"
    index = json_of(path)
    family = family_of(folder, index)
    for part in family.parts:
        named = index.get(part.folder)
        if not _named(index, part.folder):
            told = "null" if named in (None, [None, None]) else str(named)[:100]
            raise UserError(
                f"{path}: {part.folder} is {told}, and {family.pipeline} draws with it; expected {part.classes[0]}"
            )
        if index[part.folder][1] not in part.classes:
            told = index[part.folder][1][:100]
            raise UserError(f"{path}: {part.folder} is {told!r}; expected {' or '.join(part.classes)}")
    if not _named(index, "scheduler"):
        raise UserError(f"{path}: names no scheduler; expected its library and class")
    known = {*_IDLE, "scheduler", *(part.folder for part in family.parts)}
    for name, value in index.items():
        if name not in known and _named(index, name):
            told = f"{name[:60]} ({value[1][:60]})"
            raise UserError(f"{path}: names the part {told}, which {family.pipeline} here does not have")
    return index, family


def _weights(paths: list[Path]) -> tuple[dict[str, Entry], list[str]]:
    """Returns the tensors of a part's files and the files' SHA-256."""
    held: dict[str, Entry] = {}
    hashes = []
    for path in paths:
        entries, sha256 = read(path)
        held |= entries
        hashes.append(sha256)
    return held, hashes


def _configuration(part: Path) -> dict[str, Any]:
    """Returns what decides in a part's config.json, so that libraries that write more nulls change no digest."""
    config = json_of(part / "config.json")
    return {
        key: value
        for key, value in config.items()
        if value is not None and not key.startswith("_") and key not in _BOOKKEEPING
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _folder_digest(folder: Path, hashes: dict[str, str]) -> str:
    """Returns what files.sha256_folder does, without reading again the files whose SHA-256 is known."""
    known = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sha256 = hashes.get(str(path)) or sha256_file(path)
        known.update(f"{path.relative_to(folder).as_posix()}\0{sha256}\n".encode())
    return known.hexdigest()


def _stamp(folder: Path) -> Stamp:
    """Returns size, times and inode of every file of the parts that draw."""
    family = families.of_folder(folder)
    parts = [folder / part for part in (*(each.folder for each in family.parts), "scheduler")]
    paths = [folder / "model_index.json", *(path for part in parts for path in part.rglob("*") if path.is_file())]
    stamp = []
    for path in sorted(paths):
        told = path.stat()
        name = path.relative_to(folder).as_posix()
        stamp.append((name, told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino))
    return tuple(stamp)
