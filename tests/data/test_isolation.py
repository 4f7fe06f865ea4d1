import os
import signal
import time

import pytest

from lcmlora.data.isolation import CRASHED, TOO_LONG, isolated


def work(item: str) -> str:
    if item == "hang":
        time.sleep(60)
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "eat":
        try:
            bytearray(3 << 30)
        except MemoryError:
            return "refused"
    if item == "raise":
        raise RuntimeError("a mistake of ours")
    return item


def _run(*items: str, **options: float) -> list[str]:
    def lost(item: str, why: str) -> str:
        return f"{item}: {why}"

    return list(isolated(work, items, lost, 2, preload=__name__, memory=2 << 30, **options))


def test_results_come_in_order_and_what_crashes_hangs_or_eats_memory_costs_itself_alone():
    items = ["a", "crash", "b", "hang", "c", "eat", *map(str, range(40))]
    expected = ["a", f"crash: {CRASHED}", "b", f"hang: {TOO_LONG}", "c", "refused", *map(str, range(40))]
    assert _run(*items, seconds=3) == expected


def test_a_mistake_of_the_program_is_no_result():
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        _run("a", "raise", "b")
