"""The families of bases: one class for each, by name in `lcmlora.plugins.FAMILIES`."""

from lcmlora.bases.families.family import (
    DEFAULT_FAMILY,
    Conditioning,
    Family,
    by_name,
    by_pipeline,
    known,
    of_folder,
    of_network,
    of_tensors,
)

__all__ = [
    "DEFAULT_FAMILY",
    "Conditioning",
    "Family",
    "by_name",
    "by_pipeline",
    "known",
    "of_folder",
    "of_network",
    "of_tensors",
]
