"""The release bundle of one adapter: its files, its identity, its checksums, its provenance."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from pydantic import Field

from lcmlora.adapters.metadata import (
    FACTS,
    SCHEDULER,
    WEIGHTS,
    AdapterFacts,
    DistillSettings,
    Sampler,
    SamplerFacts,
    read_sampler,
)
from lcmlora.dvc_files.commits import Commit
from lcmlora.errors import UserError
from lcmlora.io.documents import Document, Number
from lcmlora.io.files import sha256_file
from lcmlora.io.parsing import JsonObject, as_object, read_bytes, read_json

PROVENANCE = "provenance.json"
METRICS = "metrics.json"
REPORT = "report.html"
WORKFLOW = "comfyui.json"
SAMPLE = "sample.png"
COMPATIBILITY = "compatibility.json"
CHECKSUMS = "SHA256SUMS"
DRAWING_FILES = (WEIGHTS, SCHEDULER, PROVENANCE)  # the files that drawing needs
ADAPTER_FILES = (CHECKSUMS, *DRAWING_FILES)  # the files of a download without the report and the rest

_LONGEST_NAME = 200  # bytes; a file system allows 255, and a download adds some to the name
_RESERVED = ("manifest.json", "yanked.json", "pruned.json", "sha256sums.sig")  # files that a store adds to a release


class Proof(Document):
    """How close the reloaded adapter is to the trained one. Shares of the student's largest output."""

    error: Number  # largest difference of the reloaded student from the trained one
    effect: Number  # largest difference of the trained student from the bare base
    tensors: int  # LoRA tensors that plain diffusers loaded


class Decision(Document):
    """The gate's decision by the figures alone, without comparing them with a champion's."""

    passed: bool
    failures: list[str]
    # Why the student is not within the gate, by its number of steps; missing in releases from before 2026-11-30.
    by_steps: dict[str, list[str]] | None = None


class Kohya(Document):
    """The weights under the name that ComfyUI and A1111 show; since 2026-11-29 the same bytes as `WEIGHTS`."""

    file: str
    sha256: str
    reloaded: Proof


class SamplerCheck(Document):
    """The sampler as plain diffusers takes it from the release, compared with the adapter's own.

    scheduler_config: scheduler_config.json of the release.
    gamma: `eta` of TCDScheduler; None for other schedulers.
    side: of the pictures in pixels, to be asked for where the base draws pictures of another size by default.
    timesteps: at which the network is evaluated, by the number of steps.
    error: largest difference of the drawn latents from those of the adapter's own sampler, as a share of the largest
        value, by the number of steps.
    """

    scheduler_config: JsonObject
    gamma: Number | None
    guidance_scale: Number
    side: int | None
    timesteps: dict[str, list[int]]
    error: dict[str, Number]


class GateSettings(Document):
    """The settings of the gate that decided on the release."""

    steps: int
    min_retrieval: Number


class StageSettings(Document):
    """The settings by stage. Those of `data`, `encode` and `evaluation` are kept, too; nothing here reads them."""

    distill: DistillSettings
    gate: GateSettings


class RanWith(Document):
    """What a stage ran with, as it was then; see `stage_records.StageRecord`."""

    settings: str | None = None  # SHA-256 of its entry in resolved.yaml
    git: Commit
    package: Commit  # of lcmlora, where it was run from a repository
    versions: dict[str, str]
    device: str | None = None
    began: str | None = None  # ISO 8601, UTC
    ended: str | None = None
    changed: list[str] = Field(default_factory=list)  # what a person changed while it ran


class Provenance(Document):
    """provenance.json: what went into a release.

    `git`, `params` and `versions` are of the stages that made it, where these are known (`stages`), else of packaging.
    """

    model: str
    packaged: str | None = None  # time, ISO 8601, UTC; missing in releases from before 2026-11-28
    sha256: str  # of the weights in the release
    adapter: str | None = None  # SHA-256 of the weights as they were trained; missing where they are those above
    base: dict[str, str | None]
    resolution: int | None = None
    sampler: SamplerFacts | None = None
    sampler_check: SamplerCheck | None = None
    data_digest: str
    data_dvc: str | None = None
    pictures: str = "data/pictures"  # where the project has the prepared pictures
    seed: int | None = None
    params: StageSettings
    versions: dict[str, str] | None = None
    git: Commit
    dvc_lock: str | None = None
    gate: Decision | None = None
    recommended_steps: int | None = None  # see clients.recommended_steps; missing in releases from before 2026-11-30
    reloaded: Proof | None = None
    kohya: Kohya | None = None
    # By stage, those whose output was made on the machine that packaged; missing where none was, and until 2026-11-29.
    stages: dict[str, RanWith] | None = None
    packaged_with: RanWith | None = None

    @property
    def trained(self) -> str:
        """The SHA-256 of the adapter as it was trained, by which metrics, study and the distillation's run know it."""
        return self.adapter or self.sha256


def digest(folder: Path) -> str:
    """Returns the SHA-256 of the bundle's weights, which is the identity of the release."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; {folder} is no release")
    return sha256_file(weights)


def fault_of_name(name: str) -> str | None:
    """Returns why a bundle cannot have a file of this name, None where it can."""
    if not name or "/" in name or "\\" in name or name.startswith("."):
        return "is not the name of a file in a release's folder"
    if not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return f"is not printable, or longer than {_LONGEST_NAME} bytes"
    if name.casefold() in _RESERVED:
        return "is the name of a file that is added when a release is published"
    return None


def checksums(folder: Path) -> dict[str, str]:
    """Returns name -> SHA-256 of every file that the bundle's SHA256SUMS lists."""
    place = folder / CHECKSUMS
    if not place.is_file():
        raise UserError(f"{place}: no such file; {folder} is no release")
    sums: dict[str, str] = {}
    for number, line in enumerate(read_bytes(place).decode("utf-8", "backslashreplace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None or fault_of_name(match[2]):
            raise UserError(f"{place}: line {number}: expected '<sha256>  <file name>', got {line[:200]!r}")
        if match[2] in sums:
            raise UserError(f"{place}: line {number}: lists {match[2]} twice")
        sums[match[2]] = match[1]
    return sums


def verify(folder: Path, names: Collection[str] | None = None) -> None:
    """Checks every file against SHA256SUMS. Raises UserError naming the first that is missing or differs.

    Args:
        names: check only these files, for a download of the adapter alone.
    """
    sums = checksums(folder)
    for name in (WEIGHTS, SCHEDULER, PROVENANCE):
        if name not in sums:
            raise UserError(f"{folder / CHECKSUMS}: does not list {name}; package the release again")
    for name, expected in sums.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is listed in {CHECKSUMS} and missing; package the release again")
        if (found := sha256_file(path)) != expected:
            raise UserError(
                f"{path}: expected sha256 {expected[:12]}..., got {found[:12]}...; package the release again"
            )


def read_facts(folder: Path) -> AdapterFacts:
    """Returns the facts beside an adapter that lcmlora made; empty facts where another program wrote config.json.

    They come from provenance.json in a release, else from the config.json that distill and combine write.

    Raises:
        UserError: a value has another type than lcmlora writes.
    """
    path = next((folder / name for name in (PROVENANCE, FACTS) if (folder / name).is_file()), None)
    facts = _read(path) if path else {}
    if path is None or not isinstance(facts.get("base"), dict):
        return AdapterFacts()
    texts = {"model": facts.get("model")}
    texts |= {f"base.{key}": facts["base"].get(key) for key in ("source", "revision", "digest")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}: {key}: expected a text, got {ascii(value)[:80]}")
    resolution = facts.get("resolution")
    if resolution is not None and (type(resolution) is not int or resolution < 1):
        raise UserError(f"{path}: resolution: expected pixels, got {ascii(resolution)[:80]}")
    steps = facts.get("recommended_steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UserError(f"{path}: recommended_steps: expected a number of steps, got {ascii(steps)[:80]}")
    for key in ("params", "distill", "kohya"):
        as_object(facts.get(key) or {}, f"{path}: {key}")
    as_object((facts.get("params") or {}).get("distill") or {}, f"{path}: params.distill")
    return AdapterFacts(
        model=facts.get("model"),
        base=facts["base"],
        resolution=resolution,
        sampler=sampler_of(folder, facts),
        kohya=(facts.get("kohya") or {}).get("file"),
        recommended_steps=steps,
    )


def sampler_of(folder: Path, facts: JsonObject) -> Sampler | None:
    """Returns the sampler settings of the adapter in a folder, None where it has none.

    Adapters from before they were recorded get theirs from scheduler_config.json and the objective.

    Args:
        facts: the content of the folder's provenance.json or config.json.

    Raises:
        UserError: the settings do not fit a sampler.
    """
    if "sampler" in facts:
        return read_sampler(as_object(facts["sampler"], f"{folder}: sampler"), f"{folder}: sampler")
    path = folder / SCHEDULER
    if not path.is_file():
        return None
    settings = _read(path)
    distill = (facts.get("params") or facts).get("distill") or {}
    # The gamma of each objective's sampler before it was recorded.
    gamma = {"tcd": distill.get("gamma"), "tdd": distill.get("gamma"), "pcm": 0.0}.get(
        str(distill.get("objective", "lcm"))
    )
    found = {"scheduler": settings.get("_class_name", "LCMScheduler"), "gamma": gamma}
    return read_sampler(found | {"grid": settings.get("original_inference_steps", 50)}, str(path))


def _read(path: Path) -> JsonObject:
    return as_object(read_json(path), str(path))
