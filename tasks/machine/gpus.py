"""Which GPUs of this machine a command would use, as CUDA_VISIBLE_DEVICES says, without importing torch."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from lcmlora.io.terminal import joined
from lcmlora.tasks.output import log_line

_TIMEOUT = 60.0  # seconds; nvidia-smi takes some where the driver is not loaded all the time


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it."""

    uuid: str
    name: str


def used(count: int, environment: Mapping[str, str] | None = None) -> list[str]:
    """Returns the UUIDs of the first GPUs that CUDA shows to a command; empty if there is none, or no NVIDIA driver.

    CUDA may number GPUs of different kinds otherwise than nvidia-smi does. If it was told to show some of these by
    number, all are returned.

    Args:
        count: of processes, each of which uses a GPU.
    """
    return visible(installed(), os.environ if environment is None else environment, count)


def visible(gpus: list[Gpu], environment: Mapping[str, str], count: int) -> list[str]:
    """Returns the UUIDs of the first `count` of these GPUs that CUDA shows in this environment."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    differ = len({gpu.name for gpu in gpus}) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    if chosen is None:
        return [gpu.uuid for gpu in (gpus if differ else gpus[:count])]
    found: list[str] = []
    for word in (each.strip() for each in chosen.split(",")):
        uuid = _uuid(word, gpus)
        if uuid is None:
            break  # CUDA stops at the first that it does not know
        if word.isdigit() and differ:
            return [gpu.uuid for gpu in gpus]
        found.append(uuid)
    return list(dict.fromkeys(found[:count]))


def _uuid(word: str, gpus: list[Gpu]) -> str | None:
    if word.isdigit():
        return gpus[int(word)].uuid if int(word) < len(gpus) else None
    if word.startswith("MIG-"):
        return word
    matching = [gpu.uuid for gpu in gpus if word and gpu.uuid.startswith(word)]
    return matching[0] if len(matching) == 1 else None


def installed() -> list[Gpu]:
    """Returns the GPUs of this machine in nvidia-smi's order. Where it fails, there are none, and it says so."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        log_line(f"warning: nvidia-smi: {error}; GPUs are not locked one by one")
        return []
    if done.returncode != 0:
        log_line(f"warning: nvidia-smi: {joined(done.stderr or done.stdout)}; GPUs are not locked one by one")
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    return [Gpu(row[0], row[1]) for row in rows if len(row) == 2]
