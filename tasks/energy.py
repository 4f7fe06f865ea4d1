"""The GPUs of this machine and the energy that they have used, by NVIDIA's driver library, without torch."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

_LIBRARY = "libnvidia-ml.so.1"  # a part of the driver
_OK = 0
_NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


@dataclass(frozen=True)
class Gpu:
    """A GPU that processes of this one may use."""

    index: int  # the driver's
    uuid: str  # GPU-...
    name: str


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """Returns the driver's library, None on machines without one."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return library if library.nvmlInit_v2() == _OK else None


def gpus() -> list[Gpu]:
    """Returns the GPUs in the order of CUDA_VISIBLE_DEVICES, or of the driver; none on machines without a driver."""
    driver = _driver()
    count = ctypes.c_uint()
    if driver is None or driver.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _OK:
        return []
    found = [gpu for index in range(count.value) if (gpu := _describe(driver, index)) is not None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else _visible(found, visible)


def _visible(found: Sequence[Gpu], visible: str) -> list[Gpu]:
    """Returns the GPUs that CUDA shows: up to the first entry that names none, as CUDA does it."""
    chosen: list[Gpu] = []
    for entry in filter(None, visible.split(",")):
        word = entry.strip()
        match = [gpu for gpu in found if str(gpu.index) == word or (word[:4] == "GPU-" and gpu.uuid.startswith(word))]
        if len(match) != 1:
            break
        chosen += match
    return chosen


def _describe(driver: ctypes.CDLL, index: int) -> Gpu | None:
    handle, name, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(96)
    if driver.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _OK:
        return None
    named = driver.nvmlDeviceGetName(handle, name, _NAME_BYTES) == _OK
    known = driver.nvmlDeviceGetUUID(handle, uuid, 96) == _OK
    return Gpu(index, uuid.value.decode() if known else "", name.value.decode() if named else "unknown GPU")


def joules(used: Sequence[Gpu]) -> float | None:
    """Returns the energy that these GPUs have used since the driver was loaded; None where one does not say it.

    GPUs before Volta do not. A shared GPU counts what others do on it, too.
    """
    driver, total = _driver(), 0.0
    if driver is None or not used:
        return None
    for gpu in used:
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if driver.nvmlDeviceGetHandleByIndex_v2(gpu.index, ctypes.byref(handle)) != _OK:
            return None
        if driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != _OK:
            return None
        total += millijoules.value / 1000
    return total
