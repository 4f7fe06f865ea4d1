"""How long drawing took: what the machine decides of an evaluation, kept apart from what the inputs decide.

`metrics/MODEL.json` and all that DVC tracks is the same on every machine of a kind. Seconds are not, so they are kept
in `timings/MODEL/`, which neither Git nor DVC tracks; the release holds both.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lcmlora.evaluation.figures import Key, Latency
from lcmlora.io.documents import Document, Number

REFERENCE, EVALUATION = "reference.json", "evaluation.json"  # in timings/MODEL


class Measured(Document):
    """Seconds, as metrics.json of a release has them."""

    seconds_per_picture: dict[Key, Number] = Field(default_factory=dict)  # of sampling latents in full batches
    latency: Latency | None = None  # of one picture alone


class Timings(Document):
    """What was measured on this machine, and of what."""

    reference_digest: str  # SHA-256 of the reference's features.safetensors
    adapter: str | None  # SHA-256 of its weights; None for the reference itself
    measured: Measured


def read(path: Path, *, reference_digest: str | None, adapter: str | None = None) -> Measured:
    """Returns the timings that this machine measured for this reference and adapter; empty if it measured none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return Measured()
    found = Timings.read(path)
    return found.measured if (found.reference_digest, found.adapter) == (reference_digest, adapter) else Measured()
