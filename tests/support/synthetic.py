"""A source of any number of pictures that are nowhere: records follow from their numbers, and nothing is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from lcmlora.data.preparation.shards import InputShard
from lcmlora.data.reading.candidates import DAMAGED, MISSING, NO_CAPTION, Candidate, Caption, Rejection, Unusable
from lcmlora.data.sources.source import EncodedPictures, Record, record_line
from lcmlora.io.isolation import Processes

SHARD = 10_000  # pictures, as in a tar file of img2dataset


class Synthetic(EncodedPictures):
    """As many pictures as `data.path` says, such as `2000000 pictures`.

    Of a hundred one has no caption, one is damaged, one is too small, one is a duplicate of an earlier one, and ten
    have the caption of another.
    """

    def shards(self) -> Iterator[InputShard]:
        count = int(self.data.path.partition(" ")[0])
        for start in range(0, count, SHARD):
            end = min(count, start + SHARD)
            yield InputShard(f"{start // SHARD:05d}.tar", f"{start} to {end}", [start, end])

    def listed(self, shard: InputShard, processes: Processes) -> Iterator[Candidate | Rejection]:
        for number in range(*shard.content):
            key = f"{shard.name}/{number:09d}.jpg"
            if number % 100 == 17:
                yield Rejection(key, NO_CAPTION)
                continue
            words = hashlib.sha256(f"{number % 10_000_019 // 10 * 10 if number % 10 == 3 else number}".encode())
            text = f"a photograph of {words.hexdigest()[:40]} in the afternoon, high resolution"
            yield Candidate(key, Caption(text), f"{shard.name}@{number * 50_000}+48213")

    def read(self, place: str) -> bytes:
        raise Unusable(MISSING)

    def examined(self, candidates: Sequence[Candidate], processes: Processes) -> Iterator[bytes | Rejection]:
        for candidate in candidates:
            number = int(candidate.key[-13:-4])
            if number % 100 == 33:
                yield Rejection(candidate.key, DAMAGED, rank=101)
                continue
            same = number // 2 if number % 100 == 51 else number
            sha256 = hashlib.sha256(f"bytes {same}".encode()).hexdigest()
            look = None if self.data.near_duplicates is None else hashlib.sha256(sha256.encode()).hexdigest()[:16]
            side = 20 if number % 100 == 77 else 512
            caption = candidate.caption.text
            yield record_line(Record(candidate.key, caption, sha256, side, side, candidate.place, look=look))
