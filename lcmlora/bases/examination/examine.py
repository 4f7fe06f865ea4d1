"""The examination of a base: every part is there, whole, finite and fits the others; and the base's digests.

Reading all weights takes seconds for each gigabyte. The result is therefore kept in a record, with a stamp of size,
times and inode of every file that was examined; while the stamp is the same, nothing is read again. `fetch` makes the
folder of the records, `.examined/`, beside the bases' folders. A base that was never fetched has no such folder, and on
a read-only disk no record can be written: then each process reads the base once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lcmlora.bases import families
from lcmlora.bases.examination import structure
from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig
from lcmlora.bases.examination.weightfiles import PRECISIONS, Entry, find_weights, read_weights
from lcmlora.bases.families.family import Family, Part
from lcmlora.errors import UserError
from lcmlora.io.documents import Document
from lcmlora.io.files import sha256_file

RECORDS = ".examined"  # the folder of the records, beside the bases' folders
_VERSION = 2  # of the examination; a record of another version is not used

# Parts of published pipelines that lcmlora does not use and does not download.
_UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
# What a pipeline that cannot be distilled is, by a word in its class.
_OTHER_PIPELINES = {
    "Inpaint": "this one is for inpainting",
    "Img2Img": "this one goes from picture to picture, as SDXL's refiner does",
    "Pix2Pix": "this one is for editing",
    "Upscale": "this one is an upscaler",
    "Depth2Img": "this one takes depth maps",
    "ControlNet": "this one takes control pictures",
    "LatentConsistency": "this one is distilled already",
}
# Keys that describe the library that wrote a configuration, not the base.
_LIBRARY_KEYS = ("transformers_version", "torch_dtype", "dtype", "architectures")


@dataclass(frozen=True)
class Examination:
    """The result of an examination."""

    digest: str  # of all parts that draw: UNet, VAE, text encoders, tokenizers, schedule
    unet_digest: str  # of the files of the UNet's folder alone, by which releases before 2026-11 name their base
    dtypes: dict[str, str]  # of the weights, by part: fp32, fp16, bf16, or several as fp16+fp32

    def __str__(self) -> str:
        dtypes = ", ".join(f"{part} {dtype}" for part, dtype in self.dtypes.items())
        return f"{dtypes}; digest {self.digest[:12]}"


class _Record(Document):
    """The file in `.examined/` that keeps an examination."""

    version: int
    folder: str
    variant: str | None
    stamp: str
    digest: str
    unet_digest: str
    dtypes: dict[str, str]


def examine_base(name: str, folder: Path, variant: str | None = None) -> Examination:
    """Examines the base in a diffusers folder; returns the result of an earlier call if no file has changed since.

    Args:
        name: the base's name, for errors about its keys in params.yaml.
        variant: the variant in which its weights are loaded, such as fp16.

    Raises:
        UserError: the first fault, with the number of the others.
    """
    try:
        return _recorded_or_examined(name, folder, variant)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


def _recorded_or_examined(name: str, folder: Path, variant: str | None) -> Examination:
    check_parts(folder)
    stamp = _stamp(folder)
    path = folder.parent / RECORDS / f"{folder.name}.json"
    if (record := _read_record(path)) is not None:
        examined = record.version, record.folder, record.variant, record.stamp
        if examined == (_VERSION, str(folder.resolve()), variant, stamp):
            return Examination(record.digest, record.unet_digest, record.dtypes)
    examination = _examine(name, folder, variant, folder.resolve(), stamp)
    if path.parent.is_dir() and os.access(path.parent, os.W_OK):
        _Record(
            version=_VERSION,
            folder=str(folder.resolve()),
            variant=variant,
            stamp=stamp,
            digest=examination.digest,
            unet_digest=examination.unet_digest,
            dtypes=examination.dtypes,
        ).write(path)
    return examination


def _read_record(path: Path) -> _Record | None:
    """Returns the record in a file; None if there is none, or the file is damaged or another version's."""
    if not path.is_file():
        return None
    try:
        return _Record.read(path)
    except UserError:  # the examination is made again, and the record with it
        return None


class _Faults(list[str]):
    """The faults of a base: the examination continues after each with what does not depend on it."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.append(str(error))

    def check(self) -> None:
        """Raises UserError if there is a fault."""
        if self:
            raise UserError(self[0] if len(self) == 1 else f"{self[0]} (the first of {len(self)} faults)")


@lru_cache(maxsize=32)
def _examine(name: str, folder: Path, variant: str | None, resolved: Path, stamp: str) -> Examination:
    """Examines a base once in a process while `resolved` and `stamp`, of its files, are the same."""
    faults = _Faults()
    digested: dict[str, str] = {}  # the digest of each piece that draws
    index, family = _read_index(folder)
    digested["index"] = _digest(family.drawing_options(index))
    with faults.collected():
        family.check(folder)
    with faults.collected():
        digested["schedule"] = _digest(family.examine_schedule(folder))
    # The small parts come first: their faults are reported before gigabytes are read.
    for tokenizer, encoder in zip(family.tokenizers, family.text_encoders, strict=True) if not faults else ():
        with faults.collected():
            digested[tokenizer.folder] = _digest(family.examine_tokenizer(folder, tokenizer, encoder))
    files: dict[Part, list[Path]] = {}
    for part in (family.network, family.vae, *family.text_encoders) if not faults else ():
        with faults.collected():
            files[part] = find_weights(name, folder / part.folder, part.weights, variant)
    dtypes: dict[str, str] = {}
    hashes: dict[Path, str] = {}
    for part, paths in files.items() if not faults else ():
        with faults.collected():
            entries, file_hashes = _read_files(paths)
            hashes |= file_hashes
            text = part in family.text_encoders
            structure.check_weights(folder / part.folder, family.shapes(folder, part), entries, text=text)
            dtypes[part.folder] = "+".join(
                sorted({PRECISIONS[entry.dtype] for entry in entries.values() if entry.dtype in PRECISIONS})
            )
            settings = _drawing_settings(folder / part.folder / "config.json")
            digested[part.folder] = _digest({"config": settings, "files": list(file_hashes.values())})
    faults.check()
    return Examination(_digest(digested), _folder_digest(folder / family.network.folder, hashes), dtypes)


def check_parts(folder: Path) -> None:
    """Raises UserError if the folder is not a pipeline of a known family in diffusers' layout, by file names alone."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; expected a diffusers folder, or a checkpoint that ends in .safetensors")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such base folder")
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"{folder}: a diffusers base needs {index.name}, and there is none{_hint(folder)}")
    # The folder of an unknown pipeline is compared with the default family's.
    family = families.of_folder(folder)
    required = [family.network.folder, family.vae.folder, "scheduler"]
    required += [family.tokenizers[0].folder, family.text_encoders[0].folder]
    for part in required:
        needed = folder / part / "config.json" if part in required[:2] else folder / part
        if not needed.exists():
            missing = needed.relative_to(folder) if (folder / part).is_dir() else f"{part}/"
            raise UserError(f"{folder}: a diffusers base needs {missing}, and there is none{_hint(folder)}")
    _read_index(folder)
    for each in family.parts:
        if each.folder not in required and not (folder / each.folder).is_dir():
            raise UserError(
                f"{folder}: model_index.json names {each.folder}, and there is no {each.folder}/; a base of "
                f"{family.title}'s family needs it: get the base again"
            )
    for part in required:
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: is no folder; get the base again")


def _hint(folder: Path) -> str:
    """Returns the end of an error about a folder that is no base: what it seems to be, and what to do."""
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


def family_of(index: LibraryConfig) -> Family:
    """Returns the family that a base's model_index.json names.

    Raises:
        UserError: the pipeline is of no known family, or SDXL's refiner.
    """
    class_name = index.get("_class_name")
    if index.get("requires_aesthetics_score"):
        raise UserError(
            f"{index.place}: requires_aesthetics_score is set: this is SDXL's refiner; expected the base model"
        )
    if (family := families.by_pipeline(class_name)) is None:
        hint = next((f"; {kind}" for word, kind in _OTHER_PIPELINES.items() if word in str(class_name)), "")
        known = " or ".join(sorted(each.pipeline for each in families.known()))
        raise UserError(f"{index.place}: _class_name is {str(class_name)[:100]!r}; expected {known}{hint}")
    return family


def _class_of(index: LibraryConfig, part: str) -> str | None:
    """Returns the class that model_index.json names for a part as [library, class]; None if it names none."""
    value = index.get(part)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value):
        return str(value[1])
    return None


def _read_index(folder: Path) -> tuple[LibraryConfig, Family]:
    """Returns model_index.json and its family. Raises UserError if it lacks a part of that family or has others."""
    index = LibraryConfig.read(folder / "model_index.json")
    family = family_of(index)
    for part in family.parts:
        class_name = _class_of(index, part.folder)
        if class_name is None:
            value = index.get(part.folder)
            shown = "null" if value in (None, [None, None]) else str(value)[:100]
            raise UserError(
                f"{index.place}: {part.folder} is {shown}, and {family.pipeline} draws with it; expected "
                f"{part.classes[0]}"
            )
        if class_name not in part.classes:
            raise UserError(
                f"{index.place}: {part.folder} is {class_name[:100]!r}; expected {' or '.join(part.classes)}"
            )
    if _class_of(index, "scheduler") is None:
        raise UserError(f"{index.place}: names no scheduler; expected its library and class")
    known = {*_UNUSED_PARTS, "scheduler", *(part.folder for part in family.parts)}
    for name in index:
        if name not in known and (class_name := _class_of(index, name)) is not None:
            raise UserError(
                f"{index.place}: names the part {name[:60]} ({class_name[:60]}), which {family.pipeline} here does not "
                "have"
            )
    return index, family


def _read_files(paths: list[Path]) -> tuple[dict[str, Entry], dict[Path, str]]:
    """Returns the tensors of a part's files by name, and the files' SHA-256."""
    entries: dict[str, Entry] = {}
    hashes = {}
    for path in paths:
        tensors, hashes[path] = read_weights(path)
        entries |= tensors
    return entries, hashes


def _drawing_settings(path: Path) -> DigestInput:
    """Returns the settings in a part's config.json that are not null, so that a library's new ones change no digest."""
    return {
        key: value
        for key, value in LibraryConfig.read(path).items()
        if value is not None and not key.startswith("_") and key not in _LIBRARY_KEYS
    }


def _digest(value: DigestInput) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _folder_digest(folder: Path, hashes: Mapping[Path, str]) -> str:
    """Returns the digest of files.sha256_folder without reading the files again whose SHA-256 is known."""
    sha256 = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sha256.update(f"{path.relative_to(folder).as_posix()}\0{hashes.get(path) or sha256_file(path)}\n".encode())
    return sha256.hexdigest()


def _stamp(folder: Path) -> str:
    """Returns a digest of name, size, times and inode of every file of the parts that draw."""
    family = families.of_folder(folder)
    parts = [folder / part for part in (*(each.folder for each in family.parts), "scheduler")]
    paths = [folder / "model_index.json", *(path for part in parts for path in part.rglob("*") if path.is_file())]
    stamp = hashlib.sha256()
    for path in sorted(paths):
        name, status = path.relative_to(folder).as_posix(), path.stat()
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
        stamp.update(f"{name}\0{status.st_size}\0{times}\0{status.st_ino}\n".encode())
    return stamp.hexdigest()
