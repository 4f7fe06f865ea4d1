"""How long drawing took: what the machine decides of an evaluation, kept apart from what the inputs decide.

`metrics/MODEL.json` and all that DVC tracks is the same on every machine of a kind. Seconds are not, so they are kept
in `timings/MODEL/`, which neither Git nor DVC tracks; the release holds both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmlora.io.files import write_json
from lcmlora.io.parsing import as_object, read_json

SECONDS, LATENCY = "seconds_per_picture", "latency"  # as metrics.json of a release names them

REFERENCE, EVALUATION = "reference.json", "evaluation.json"  # in timings/MODEL


def write(
    path: Path,
    seconds_per_picture: Mapping[str, float],
    *,
    reference_digest: str,
    adapter: str | None = None,
    latency: Mapping[str, Any] | None = None,
) -> None:
    """Writes what was measured on this machine, and of what.

    Args:
        seconds_per_picture: of sampling latents in full batches, by the name of the set.
        reference_digest: SHA-256 of the reference's features.safetensors.
        adapter: SHA-256 of the adapter's weights; None for the reference itself.
        latency: of one picture alone; see `drawing.latency`.
    """
    measured = {SECONDS: dict(seconds_per_picture)} | ({LATENCY: dict(latency)} if latency else {})
    write_json(path, {"reference_digest": reference_digest, "adapter": adapter, "measured": measured})


def read(path: Path, *, reference_digest: str, adapter: str | None = None) -> dict[str, Any]:
    """Returns `seconds_per_picture` and `latency` as far as this machine measured them of this very reference and
    adapter; nothing where it did not: the outputs of another machine were restored.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    found = as_object(read_json(path), str(path))
    if (found.get("reference_digest"), found.get("adapter")) != (reference_digest, adapter):
        return {}
    return as_object(found.get("measured"), f"{path}: measured")
