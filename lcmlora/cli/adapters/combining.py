"""Writing the combination of two adapters of any file spelling, with its facts."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from lcmlora.adapters import formats
from lcmlora.adapters.combine import check_weights, combine_adapters, truncate
from lcmlora.adapters.formats import DIFFUSERS
from lcmlora.adapters.layer_names import Architecture
from lcmlora.adapters.metadata import (
    FACTS,
    SCHEDULER,
    WEIGHTS,
    Combined,
    CombinedPart,
    SamplerFacts,
)
from lcmlora.bases import folders
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, sha256_file
from lcmlora.io.parsing import as_object, read_json
from lcmlora.registry.references import AdapterReference


class Combination(NamedTuple):
    """A combination that was written."""

    facts: Combined
    error: float  # largest difference of an effective weight, by rounding
    left_out: int  # tensors of text encoders and trained tokens that were left out


def write_combined(
    style: AdapterReference,
    lcm: AdapterReference,
    weights: tuple[float, float],
    out: Path,
    base: Architecture | None = None,
    rank: int | None = None,
    *,
    other_base: bool = False,
    unet_only: bool = False,
) -> Combination:
    """Writes the combination as a diffusers adapter and returns its facts.

    Args:
        out: a .safetensors file, or a folder. The folder also gets the scheduler of `lcm` and a config.json, so that
            one can draw with it.
        base: the base's layers, needed if an adapter is in kohya's format.
        rank: reduce the sum to this rank; None keeps it whole.
        other_base: combine adapters although they were made for bases with different digests.
        unet_only: leave out the tensors of text encoders.

    Raises:
        UserError: an adapter cannot be read, the two are of different bases, a weight is not finite, or the folder has
            other files than an earlier combination.
    """
    check_weights("--weights", *weights)
    if out.suffix != ".safetensors":
        _check_free(out)
    if style.base and not other_base:
        folders.check_same_base(lcm.shown, lcm.base, style.base, f"{style.shown} for")
    chosen = list(zip((style, lcm), weights, strict=True))
    parts = [(formats.read(reference.weights, base, unet_only=unet_only), weight) for reference, weight in chosen]
    adapter = combine_adapters(parts)
    truncation = None
    if rank is not None:
        adapter, truncation = truncate(adapter, rank)
    facts = Combined(
        combined=[
            CombinedPart(adapter=reference.shown, sha256=sha256_file(reference.weights), weight=weight)
            for reference, weight in chosen
        ],
        layers=len(adapter.layers),
        rank=adapter.rank,
        truncation=truncation,
    )
    left_out = sum(part.left_out for part, _ in parts)
    if out.suffix == ".safetensors":
        return Combination(facts, formats.write(adapter, out, DIFFUSERS, base), left_out)
    with atomic_folder(out) as folder:
        error = formats.write(adapter, folder / WEIGHTS, DIFFUSERS, base)
        facts.model_copy(update={"error": error} | _known(style, lcm)).write(folder / FACTS)
        scheduler = lcm.weights.with_name(SCHEDULER)
        if lcm.sampler and scheduler.is_file():
            shutil.copyfile(scheduler, folder / SCHEDULER)
    return Combination(facts, error, left_out)


def _known(style: AdapterReference, lcm: AdapterReference) -> dict[str, object]:
    """Returns the facts that a combination takes over from its parts, by the field of Combined."""
    known = {
        "model": lcm.model,
        "base": lcm.base or style.base,
        "resolution": lcm.resolution,
        "sampler": SamplerFacts(**asdict(lcm.sampler)) if lcm.sampler else None,
    }
    return {field: value for field, value in known.items() if value is not None}


def _check_free(out: Path) -> None:
    """Raises UserError where writing the folder would replace other files than an earlier combination."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    facts = out / FACTS
    if not facts.is_file() or "combined" not in as_object(read_json(facts), str(facts)):
        raise UserError(f"{out}: exists and is no earlier combination; name another folder or a .safetensors file")
