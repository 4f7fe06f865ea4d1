"""Training on many processes: the rank of this one, and what they exchange."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from lcmlora.errors import UserError
from lcmlora.io.parsing import parse_json
from lcmlora.io.terminal import shown
from lcmlora.parallel import launcher
from lcmlora.parallel.exchange import EXCHANGE_TIMEOUT, Exchange, ProcessEnded, SocketPairs, TorchGroup
from lcmlora.parallel.worker import end_with_parent


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the collective operations. Of a single process they change nothing."""

    rank: int = 0
    size: int = 1
    exchange: Exchange | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, validates and logs."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replaces the tensor by its sum over all processes."""
        if self.exchange:
            self.exchange.all_reduce_sum(tensor)

    def agree(self, **values: object) -> None:
        """Raises UserError naming the first of these values that differs between the processes.

        Args:
            values: settings, or values that JSON can hold.
        """
        if self.exchange is None:
            return
        own = json.dumps({name: _plain(value) for name, value in values.items()}).encode()
        everybody = [parse_json(content) for content in self.exchange.gather(own)]
        for name, value in everybody[0].items():
            for rank, theirs in enumerate(everybody):
                if theirs[name] != value:
                    what, this, that = _difference(name.replace("_", " "), theirs[name], value)
                    raise UserError(
                        f"process {rank} has {shown(repr(this))} as {what}, process 0 has {shown(repr(that))}; all "
                        "machines need the same files and settings"
                    )

    def wait(self) -> None:
        """Returns after all processes have called this."""
        if self.exchange:
            self.exchange.gather(b"")


def _plain(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _difference(name: str, this: Any, that: Any) -> tuple[str, Any, Any]:
    """Returns the part in which two values differ: its name, and what each has there."""
    if isinstance(this, dict) and isinstance(that, dict) and this.keys() == that.keys():
        key = next(key for key in this if this[key] != that[key])
        return _difference(f"{name}.{key}", this[key], that[key])
    return name, this, that


@contextlib.contextmanager
def connected(device: str) -> Iterator[Ranks]:
    """Yields the rank among the processes that a launcher started (ours, torchrun, accelerate); one alone without it.

    Args:
        device: as in params.yaml; a process on a GPU machine gets the GPU of its local rank.

    Raises:
        SystemExit: with launcher.LEFT, if another process does not answer any more. That process reports the reason.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    rank = int(os.environ["RANK"])
    ours = os.environ.get(launcher.PARENT) == str(os.getppid())
    if ours:
        end_with_parent(int(os.environ[launcher.PARENT]))
    gpu = _take_gpu(device)
    peers = os.environ.get(launcher.PEERS) if ours else None
    exchange: Exchange
    if peers is not None and not gpu:
        exchange = SocketPairs([_inherited(int(number)) for number in peers.split(",")], rank, size)
    else:
        _join("nccl" if gpu else "gloo", rank, size, ours)
        exchange = TorchGroup(torch.device("cuda" if gpu else "cpu"))
    try:
        yield Ranks(rank, size, exchange)
    except ProcessEnded as error:
        print(f"process {rank}: {shown(error, 300)}", file=sys.stderr)
        raise SystemExit(launcher.LEFT) from None
    finally:
        exchange.close()


def _take_gpu(device: str) -> bool:
    """Selects the GPU of the local rank. Returns False if the process works on the CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return False
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UserError(f"launch.processes: there are {torch.cuda.device_count()} GPUs and process {local} has none")
    torch.cuda.set_device(local)
    return True


def _inherited(number: int) -> socket.socket:
    os.set_inheritable(number, False)
    return socket.socket(fileno=number)


def _join(backend: str, rank: int, size: int, ours: bool) -> None:
    """Makes torch's default group: over the launcher's file or its rendezvous, or else by environment variables."""
    store: dist.Store
    if ours and (folder := os.environ.get(launcher.FOLDER)):
        store = dist.FileStore(str(Path(folder, "group")), size)
    elif ours:
        host, port = launcher.host_and_port(os.environ[launcher.RENDEZVOUS])
        met = dist.TCPStore(host, port, is_master=False, timeout=EXCHANGE_TIMEOUT)
        store = dist.PrefixStore(f"{os.environ[launcher.RUN]}/group", met)
    else:
        dist.init_process_group(backend, timeout=EXCHANGE_TIMEOUT)
        return
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=EXCHANGE_TIMEOUT)


def launched() -> bool:
    """Returns whether a launcher started this process."""
    return "RANK" in os.environ
