"""What tensors on the CPU hold, and what torch's allocator gives out and takes back, counted block by block."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor


def most_allocated(run: Callable[[], object]) -> int:
    """Returns the most bytes that tensors on the CPU have while `run` runs.

    They are the bytes of the tensors before, and those that torch's allocator gives out and takes back meanwhile. The
    memory of the process is no measure, since it keeps what the allocator took back.
    """
    held = held_storages()
    total = most = sum(held.values())
    for address, given in allocations(run):
        total += given - held.pop(address, 0)
        if given:
            held[address] = given
        most = max(most, total)
    return most


def held_storages() -> dict[int, int]:
    """Returns the bytes of each storage that tensors on the CPU hold now, by its address, once the garbage is gone."""
    from torch._subclasses.fake_tensor import is_fake

    for _ in range(3):  # some of it goes when something else has gone
        gc.collect()
    held = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when their attributes are read
        for found in gc.get_objects():
            # Compiling leaves fake tensors behind, which have no bytes.
            if isinstance(found, Tensor) and found.device.type == "cpu" and not is_fake(found):
                storage = found.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return held


def allocations(run: Callable[[], object]) -> list[tuple[int, int]]:
    """Returns what torch's allocator gives out and takes back on the CPU while `run` runs, in order.

    Each is a block's address and its bytes, 0 where it is taken back: the profiler's bytes of a block that was there
    before are those of another one that had its address at an earlier profile, or missing.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    gc.disable()  # else it depends on the garbage of before when some of it goes
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    results: Any = profiler.profiler
    waiting, found = [*results.kineto_results.experimental_event_tree()], []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            block = event.extra_fields
            found.append((event.start_time_ns, block.ptr, max(block.alloc_size, 0)))
    return [(address, given) for _, address, given in sorted(found, key=lambda each: each[0])]
