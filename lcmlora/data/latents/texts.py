"""The text of a latent cache: embeddings of the distinct captions or, where those would take too much, token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.data.latents.cache import UNCONDITIONAL, Tensors, tokens
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.progress import track

_MB = 1 << 20


@dataclass(frozen=True)
class TextPlan:
    """What is kept of the captions.

    tokenized: token ids alone; the text encoders run in every step of training.
    size: bytes.
    """

    tokenized: bool
    size: int


def plan(base: LoadedBase, captions: int, limit_mb: int) -> TextPlan:
    """Returns how so many captions are kept.

    Args:
        base: with its text encoders.
        limit_mb: that embeddings may take.
    """
    row = sum(value.numel() for value in base.unconditional().values()) * _dtype(base).itemsize
    size = row * (captions + 1)
    if size <= limit_mb * _MB:
        return TextPlan(tokenized=False, size=size)
    return TextPlan(tokenized=True, size=row + 4 * captions * sum(base.token_lengths))


def tensors(base: LoadedBase, captions: list[str], size: int, text: TextPlan) -> tuple[Tensors, int]:
    """Returns what text.safetensors holds (cache.py), and how many captions a text encoder does not read to their end.

    Args:
        size: captions in a forward.

    Raises:
        UserError: an embedding that is not finite.
    """
    if text.tokenized:
        _say(
            f"the embeddings of {len(captions)} captions are over encode.text_cache_mb: their token ids are kept, and "
            "the text encoders run in every step of training"
        )
    batches = [captions[start : start + size] for start in range(0, len(captions), size)]
    label = "tokenize captions" if text.tokenized else "encode captions"
    kept = _token_ids if text.tokenized else _embeddings
    parts, cut = [], 0
    for batch in track(batches, label, unit=size):
        parts.append(kept(base, batch))
        cut += base.count_truncated(batch)
    if cut:
        _say(f"{cut} of {len(captions)} captions have more tokens than the text encoder reads; the rest is cut off")
    whole = {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}
    return whole | {UNCONDITIONAL + name: value for name, value in _stored(base, base.unconditional()).items()}, cut


def _say(told: str) -> None:
    note(f"encode: {told}")


def _token_ids(base: LoadedBase, captions: list[str]) -> Tensors:
    return {tokens(number): ids.int() for number, ids in enumerate(base.tokenize(captions))}


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
