"""Collective operations of a training's processes: over inherited socket pairs, or torch's process group.

Nothing here listens for connections, and nothing that arrives is unpickled.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lcmlora.io.terminal import joined

EXCHANGE_TIMEOUT = timedelta(hours=1)  # long, because all others wait while the first process validates
_HEADER = struct.Struct("<cQ")  # what is exchanged, and how many bytes of it follow
_SUM, _BYTES = b"s", b"b"


class ProcessEnded(ConnectionError):
    """Another process of the training has ended."""


class Exchange(Protocol):
    """Collective operations: every process calls them, in the same order."""

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replaces the tensor by its sum over all processes."""

    def gather(self, content: bytes) -> list[bytes]:
        """Returns the content of every process, by rank. Returns after every process has called it."""

    def close(self) -> None:
        """Closes the connections of this process."""


class SocketPairs:
    """Processes of one machine, all on CPUs, that inherit connected sockets: nothing listens, so nobody else can join.

    The first process has a socket to each of the others. It adds up in the order of the ranks, so that a sum is the
    same to the bit however the processes take turns.
    """

    def __init__(self, sockets: Sequence[socket.socket], rank: int, size: int) -> None:
        """Args:
        sockets: in the first process, those to every other process, by rank; in another, the one to the first.
        """
        self._sockets, self._rank, self._size = sockets, rank, size
        for each in sockets:
            each.settimeout(EXCHANGE_TIMEOUT.total_seconds())

    def all_reduce_sum(self, tensor: Tensor) -> None:
        own = tensor.detach().contiguous()
        if self._rank == 0:
            received = torch.empty_like(own)
            for other in self._sockets:
                _receive_into(other, _SUM, _bytes_of(received))
                own.add_(received)
            for other in self._sockets:
                _send(other, _SUM, _bytes_of(own))
        else:
            _send(self._sockets[0], _SUM, _bytes_of(own))
            _receive_into(self._sockets[0], _SUM, _bytes_of(own))
        if own.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(own)

    def gather(self, content: bytes) -> list[bytes]:
        if self._rank == 0:
            every = [content, *(_receive(other, _BYTES) for other in self._sockets)]
            for other in self._sockets:
                for each in every:
                    _send(other, _BYTES, memoryview(each))
            return every
        _send(self._sockets[0], _BYTES, memoryview(content))
        return [_receive(self._sockets[0], _BYTES) for _ in range(self._size)]

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _send(to: socket.socket, kind: bytes, content: memoryview) -> None:
    try:
        to.sendall(_HEADER.pack(kind, len(content)))
        if content:  # a peer that has got everything may have closed its end, so that sending nothing would fail
            to.sendall(content)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ProcessEnded("another process has ended") from error


def _receive(source: socket.socket, kind: bytes) -> bytes:
    content = bytearray(_announced(source, kind))
    _fill(source, memoryview(content))
    return bytes(content)


def _receive_into(source: socket.socket, kind: bytes, content: memoryview) -> None:
    if (size := _announced(source, kind)) != len(content):
        raise RuntimeError(f"the processes are out of step: {size} bytes received, {len(content)} were expected")
    _fill(source, content)


def _announced(source: socket.socket, kind: bytes) -> int:
    header = bytearray(_HEADER.size)
    _fill(source, memoryview(header))
    received, size = _HEADER.unpack(header)
    if received != kind:
        raise RuntimeError(f"the processes are out of step: {received!r} received, {kind!r} was expected")
    return int(size)


def _fill(source: socket.socket, content: memoryview) -> None:
    done = 0
    while done < len(content):
        try:
            count = source.recv_into(content[done:])
        except ConnectionResetError as error:
            raise ProcessEnded("another process has ended") from error
        if count == 0:
            raise ProcessEnded("another process has ended")
        done += count


class TorchGroup:
    """Processes on GPUs, on several machines, or started by torchrun or accelerate: torch's default group."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def all_reduce_sum(self, tensor: Tensor) -> None:
        with _missing_peers():
            dist.all_reduce(tensor)

    def gather(self, content: bytes) -> list[bytes]:
        sizes = self._gather(torch.tensor([len(content)], device=self._device))
        most = max(int(size) for size in sizes)
        padded = torch.zeros(max(most, 1), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else padded[:0]
        every = self._gather(padded.to(self._device))
        return [bytes(each.cpu().numpy()[: int(size)]) for each, size in zip(every, sizes, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        with _missing_peers():
            dist.all_gather(every, tensor)
        return every

    def close(self) -> None:
        dist.destroy_process_group()


@contextlib.contextmanager
def _missing_peers() -> Iterator[None]:
    """Raises ProcessEnded for the RuntimeError that torch raises if another process does not answer any more."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessEnded(joined(error)) from error
