"""Training on many processes: who this one is, and the little they have to tell each other."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lcmlora.config import Launch
from lcmlora.errors import UserError

_PATIENCE = timedelta(hours=1)  # the others wait while the first process validates
_LAUNCHER = "LCMLORA_LAUNCHER"  # environment: the process id of `launch`
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. Alone, everything it is asked to exchange is what it has."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, validates and logs."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Puts the sum over all processes in place of the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agree(self, **values: object) -> None:
        """Raises UserError naming the first of these values that differs between the processes."""
        if self.size == 1:
            return
        everybody: list[dict[str, object]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everybody, values)
        for name, value in everybody[0].items():
            for rank, theirs in enumerate(everybody):
                if theirs[name] != value:
                    raise UserError(
                        f"process {rank} has {theirs[name]!r} as {name.replace('_', ' ')}, process 0 has {value!r}; "
                        "all machines need the same files and settings"
                    )

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def connected(device: str) -> Iterator[Ranks]:
    """Yields this process's place among those that a launcher (torchrun, accelerate) started; alone without one.

    Args:
        device: as in params.yaml; a process on a GPU machine gets the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if os.environ.get(_LAUNCHER) == str(os.getppid()):
        _end_with_parent()
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"launch.processes: there are {torch.cuda.device_count()} GPUs and process {local} has none"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """Lets Linux kill this process when its launcher is killed, which can then end nobody any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def launched() -> bool:
    """Returns whether a launcher started this process."""
    return "RANK" in os.environ


def launch(settings: Launch, module: str, arguments: Sequence[str]) -> int:
    """Runs `python -m MODULE ARGUMENTS` in every process of this machine and returns the exit status.

    Where one of them ends with an error the others are ended, too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A process that fails has said why; the launcher would add thirty lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=settings.machines,
        max_nodes=settings.machines,
        nproc_per_node=settings.processes,
        run_id="lcmlora",
        rdzv_backend="c10d",
        rdzv_endpoint=settings.rendezvous or "localhost:0",
        max_restarts=0,
    )
    os.environ[_LAUNCHER] = str(os.getpid())
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // settings.processes))
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", module, *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    return 0
