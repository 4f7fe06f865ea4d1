"""What the teacher said of the samples of a stream, kept on disk for later runs on the same samples.

A sample is its place in the stream (batches.py), and of its noisy state the teacher's two outputs depend on nothing
that a sweep varies: not on guidance, rate, rank, objective or optimizer. A run that finds them saves two of its four
UNet passes, and has the same losses to the bit, for the outputs are kept in the precision in which they are computed.
"""

from __future__ import annotations

import math
import os
import struct
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lcmlora.io.terminal import note

_CRC = struct.Struct("<I")


class TeacherCache:
    """A file with a record for each place: CRC-32, then the conditional and the unconditional output.

    A record that is missing, or that a killed process left half written, counts as not there. Many processes may write
    to one file.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, places: int, limit: int) -> None:
        """Opens the file, made where missing.

        Args:
            shape: (C, h, w) of an output.
            places: samples that a run sees.
            limit: bytes that the file may have; samples after it are not kept.
        """
        self._shape, self._dtype = shape, dtype
        self._payload = 2 * math.prod(shape) * dtype.itemsize
        self.record = _CRC.size + self._payload
        self.places = min(places, limit // self.record)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if self.places < places:
            needed = places * self.record / 1e9
            print(
                f"teacher cache: {self.places} of {places} samples are kept, all need teacher_cache_gb: {needed:.3g}",
                file=sys.stderr,
            )

    def read(self, places: range) -> tuple[Tensor, Tensor] | None:
        """Returns both outputs (B, C, h, w) on the CPU; None unless all of these places are there."""
        if self._file is None or places.start < 0 or places.stop > self.places:
            return None
        content = bytearray(os.pread(self._file, len(places) * self.record, places.start * self.record))
        if len(content) < len(places) * self.record:
            return None
        view = memoryview(content)
        for start in range(0, len(content), self.record):
            (crc,) = _CRC.unpack_from(content, start)
            if zlib.crc32(view[start + _CRC.size : start + self.record]) != crc:
                return None
        rows = torch.frombuffer(content, dtype=torch.uint8).view(len(places), self.record)
        outputs = rows[:, _CRC.size :].contiguous().view(self._dtype).view(len(places), 2, *self._shape)
        return outputs[:, 0], outputs[:, 1]

    def write(self, places: range, conditional: Tensor, unconditional: Tensor) -> None:
        """Keeps both outputs (B, C, h, w). A full disk ends the keeping, not the run."""
        if self._file is None or places.start < 0 or places.stop > self.places:
            return
        both = torch.stack([conditional, unconditional], dim=1).to("cpu", self._dtype).contiguous()
        rows = both.view(torch.uint8).view(len(places), self._payload).numpy()
        content = b"".join(_CRC.pack(zlib.crc32(row)) + row.tobytes() for row in rows)
        try:
            os.pwrite(self._file, content, places.start * self.record)
        except OSError as error:
            note(f"warning: {self._path}: nothing more is kept of the teacher: {error.strerror}")
            os.close(self._file)
            self._file = None
