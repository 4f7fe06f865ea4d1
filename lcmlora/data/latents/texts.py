"""The captions of a latent cache: their embeddings, or their token ids if the embeddings would be too large."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.data.latents.cache import UNCONDITIONAL, Tensors, token_ids_name
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.progress import track

_MB = 1 << 20


@dataclass(frozen=True)
class TextPlan:
    """How the captions are kept.

    tokenized: only as token ids; the text encoders run in every step of training.
    size: bytes that text.safetensors takes.
    """

    tokenized: bool
    size: int


def plan_text(base: LoadedBase, captions: int, limit_mb: int) -> TextPlan:
    """Returns how this number of distinct captions is kept.

    Args:
        base: with its text encoders.
        limit_mb: megabytes that embeddings may take.
    """
    row = sum(value.numel() for value in base.unconditional().values()) * _dtype(base).itemsize
    size = row * (captions + 1)
    if size <= limit_mb * _MB:
        return TextPlan(tokenized=False, size=size)
    return TextPlan(tokenized=True, size=row + 4 * captions * sum(base.token_lengths))


def encode_captions(base: LoadedBase, captions: list[str], batch: int, plan: TextPlan) -> tuple[Tensors, int]:
    """Returns the tensors of text.safetensors (cache.py), and how many captions have more tokens than a text encoder
    reads.

    Args:
        batch: captions in a forward.

    Raises:
        UserError: an embedding is not finite.
    """
    if plan.tokenized:
        _note(
            f"the embeddings of {len(captions)} captions are over encode.text_cache_mb: their token ids are kept, and "
            "the text encoders run in every step of training"
        )
    batches = [captions[start : start + batch] for start in range(0, len(captions), batch)]
    label = "tokenize captions" if plan.tokenized else "encode captions"
    make_rows = _token_ids if plan.tokenized else _embeddings
    parts, cut = [], 0
    for texts in track(batches, label, unit=batch):
        parts.append(make_rows(base, texts))
        cut += base.count_truncated(texts)
    if cut:
        _note(f"{cut} of {len(captions)} captions have more tokens than the text encoder reads; the rest is cut off")
    whole = {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}
    return whole | {UNCONDITIONAL + name: value for name, value in _stored(base, base.unconditional()).items()}, cut


def _note(line: str) -> None:
    note(f"encode: {line}")


def _token_ids(base: LoadedBase, captions: list[str]) -> Tensors:
    return {token_ids_name(number): ids.int() for number, ids in enumerate(base.tokenize(captions))}


def _embeddings(base: LoadedBase, captions: list[str]) -> Tensors:
    embeddings = _stored(base, base.encode_text(captions))
    for name, value in embeddings.items():
        finite = value.flatten(1).isfinite().all(1)
        if not finite.all():
            raise UserError(
                f"{name} of caption {captions[int(finite.int().argmin())]!r} is not finite; is {base.folder} whole?"
            )
    return embeddings


def _stored(base: LoadedBase, conditioning: Conditioning) -> Tensors:
    return {name: value.to("cpu", _dtype(base)) for name, value in conditioning.items()}


def _dtype(base: LoadedBase) -> torch.dtype:
    return torch.float32 if base.dtype == torch.float32 else torch.float16
