"""Two adapters of any spelling written as one, with what is known of it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcmlora.adapters import formats
from lcmlora.adapters.combine import check_weights, combine, truncate
from lcmlora.adapters.formats import DIFFUSERS
from lcmlora.adapters.layer_names import Architecture
from lcmlora.adapters.metadata import FACTS, SCHEDULER, WEIGHTS
from lcmlora.bases import folders
from lcmlora.cli.adapters.references import AdapterReference
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, sha256_file, write_json
from lcmlora.io.parsing import as_object, read_json


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
) -> dict[str, Any]:
    """Writes the combination as a diffusers adapter and returns what became of it.

    Args:
        out: a .safetensors file, or a folder, which also gets the scheduler of `lcm` and config.json, so that it can be
            drawn with; a folder that holds anything but an earlier combination is left alone.
        base: whose layers they are, where one is in kohya's format.
        rank: cut the sum down to this rank; None keeps it whole.
        other_base: combine adapters though they were made for bases with different digests.
        unet_only: leave tensors of text encoders out.

    Raises:
        UserError: an adapter cannot be read, the two are not of one base, a weight is not finite, or the folder is
            taken.
    """
    check_weights("--weights", *weights)
    if out.suffix != ".safetensors":
        _check_free(out)
    if style.base and not other_base:
        folders.check_same_base(lcm.shown, lcm.base, style.base, f"{style.shown} for")
    chosen = list(zip((style, lcm), weights, strict=True))
    parts = [(formats.read(reference.weights, base, unet_only=unet_only), weight) for reference, weight in chosen]
    adapter = combine(parts)
    loss = None
    if rank is not None:
        adapter, loss = truncate(adapter, rank)
    facts = {
        "combined": [
            {"adapter": reference.shown, "sha256": sha256_file(reference.weights), "weight": weight}
            for reference, weight in chosen
        ],
        "layers": len(adapter.layers),
        "rank": adapter.rank,
        "truncation": asdict(loss) if loss else None,
    }
    left_out = {"left_out": sum(part.left_out for part, _ in parts)}
    if out.suffix == ".safetensors":
        return facts | left_out | {"error": formats.write(adapter, out, DIFFUSERS, base)}
    with atomic_folder(out) as folder:
        facts["error"] = formats.write(adapter, folder / WEIGHTS, DIFFUSERS, base)
        known = {
            "model": lcm.model,
            "base": lcm.base or style.base,
            "resolution": lcm.resolution,
            "sampler": asdict(lcm.sampler) if lcm.sampler else None,
        }
        write_json(folder / FACTS, facts | {key: value for key, value in known.items() if value is not None})
        scheduler = lcm.weights.with_name(SCHEDULER)
        if lcm.sampler and scheduler.is_file():
            shutil.copyfile(scheduler, folder / SCHEDULER)
    return facts | left_out


def _check_free(out: Path) -> None:
    """Raises UserError where writing the folder would do away with something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    facts = out / FACTS
    if not facts.is_file() or "combined" not in as_object(read_json(facts), str(facts)):
        raise UserError(
            f"{out}: is in the way and is no earlier combination; name another folder or a .safetensors file"
        )
