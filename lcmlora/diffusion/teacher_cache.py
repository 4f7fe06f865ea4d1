"""The teacher cache: the teacher's outputs for samples, kept on disk for later runs on the same samples.

A sample's index fixes its noisy state (lcmlora/training/batches.py). The teacher's two outputs for that state do not
depend on what a sweep varies: guidance, learning rate, rank, objective, optimizer. A run that reads them saves two of
its four UNet passes, and has the same losses to the bit: outputs are kept in the precision in which they are computed.
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
    """A file with a record for each sample: CRC-32, then the conditional and the unconditional output.

    A record that a killed process left half written counts as missing. Several processes may write to one file.

    record_bytes: of a record.
    capacity: number of samples that are kept, from the first.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, samples: int, limit: int) -> None:
        """Opens the file; makes it if it does not exist.

        Args:
            shape: (C, h, w) of an output.
            dtype: of the outputs, in which they are computed.
            samples: number of samples of a run.
            limit: of the file's size, in bytes; samples beyond it are not kept.
        """
        self._shape, self._dtype = shape, dtype
        self._payload = 2 * math.prod(shape) * dtype.itemsize
        self.record_bytes = _CRC.size + self._payload
        self.capacity = min(samples, limit // self.record_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if self.capacity < samples:
            needed = samples * self.record_bytes / 1e9
            print(
                f"teacher cache: {self.capacity} of {samples} samples are kept, "
                f"all need teacher_cache_gb: {needed:.3g}",
                file=sys.stderr,
            )

    def read(self, samples: range) -> tuple[Tensor, Tensor] | None:
        """Returns both outputs (B, C, h, w) on the CPU, in the cache's dtype; None unless all samples are kept.

        Args:
            samples: their indices, B of them.
        """
        if self._file is None or samples.start < 0 or samples.stop > self.capacity:
            return None
        content = bytearray(os.pread(self._file, len(samples) * self.record_bytes, samples.start * self.record_bytes))
        if len(content) < len(samples) * self.record_bytes:
            return None
        view = memoryview(content)
        for start in range(0, len(content), self.record_bytes):
            (crc,) = _CRC.unpack_from(content, start)
            if zlib.crc32(view[start + _CRC.size : start + self.record_bytes]) != crc:
                return None
        rows = torch.frombuffer(content, dtype=torch.uint8).view(len(samples), self.record_bytes)
        outputs = rows[:, _CRC.size :].contiguous().view(self._dtype).view(len(samples), 2, *self._shape)
        return outputs[:, 0], outputs[:, 1]

    def write(self, samples: range, conditional: Tensor, unconditional: Tensor) -> None:
        """Keeps both outputs (B, C, h, w). If the disk is full, nothing more is kept, and the run continues."""
        if self._file is None or samples.start < 0 or samples.stop > self.capacity:
            return
        both = torch.stack([conditional, unconditional], dim=1).to("cpu", self._dtype).contiguous()
        rows = both.view(torch.uint8).view(len(samples), self._payload).numpy()
        content = b"".join(_CRC.pack(zlib.crc32(row)) + row.tobytes() for row in rows)
        try:
            os.pwrite(self._file, content, samples.start * self.record_bytes)
        except OSError as error:
            note(f"warning: {self._path}: nothing more is kept of the teacher: {error.strerror}")
            os.close(self._file)
            self._file = None
