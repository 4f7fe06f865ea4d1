import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from lcmlora.io.isolation import CRASHED, NO_MEMORY, TOO_LONG, Lost, Piece, Processes, in_pieces, isolated


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
    if item == "fill":
        bytearray(3 << 30)
    if item == "raise":
        raise RuntimeError("a mistake of ours")
    return item


def letters(item: str) -> Piece[str, str]:
    """The first letter; behind it the next piece begins."""
    if item.startswith("!"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return Piece([item[0]], item[1:] or None)


def environment(name: str) -> str:
    return os.environ.get(name, "not there")


def _run(*items: str, function: Callable[[str], str] = work, **options: float) -> list[str]:
    def lost(item: str, why: str) -> str:
        return f"{item}: {why}"

    return list(isolated(function, items, lost, 2, preload=[__name__], memory=2 << 30, **options))


def test_results_come_in_order_and_what_crashes_hangs_or_eats_memory_costs_itself_alone():
    items = ["a", "crash", "b", "hang", "c", "eat", "fill", *map(str, range(40))]
    expected = ["a", f"crash: {CRASHED}", "b", f"hang: {TOO_LONG}", "c", "refused", f"fill: {NO_MEMORY}"]
    expected += map(str, range(40))
    assert _run(*items, seconds=3) == expected


def test_a_mistake_of_the_program_is_no_result():
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        _run("a", "raise", "b")


def test_a_process_has_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch):
    _run("a")  # from here on there is a server that others are forked from
    monkeypatch.setenv("LCMLORA_TEST", "set later")
    assert _run("LCMLORA_TEST", function=environment) == ["set later"]


def test_pieces_come_in_the_order_of_the_items_and_one_that_crashes_says_where_to_go_on():
    def lost(item: str, why: str) -> Piece[str, str]:
        return Piece([why], item[1:] or None)

    found = list(in_pieces(letters, ["abc", "d", "e!f", "!", "ghij"], lost, 2, preload=[__name__]))
    assert found == ["a", "b", "c", "d", "e", CRASHED, "f", CRASHED, "g", "h", "i", "j"]
    for first in in_pieces(letters, ["abc", "d"], lost, 2, preload=[__name__]):
        assert first == "a"
        break  # what is not asked for any more is not read


def test_processes_that_stay_are_replaced_when_they_are_lost():
    processes = Processes(1, preload=[__name__])
    with pytest.raises(Lost, match=CRASHED):
        processes.call(work, "crash")
    with pytest.raises(Lost, match=TOO_LONG):
        processes.call(work, "hang", seconds=1)
    assert processes.call(work, "a") == "a"
    assert [*processes.pieces(letters, "ab!c", lambda item, why: Piece([why], item[1:] or None))] == [
        "a", "b", CRASHED, "c",
    ]  # fmt: skip
    processes.close()


def test_whoever_waits_for_processes_is_told_when_they_end():
    processes = Processes(1, preload=[__name__])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(processes.call, work, "hang")
        time.sleep(1)
        processes.close()
        with pytest.raises(CancelledError):
            waiting.result(timeout=30)
