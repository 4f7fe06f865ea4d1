"""Seeded mutations of good inputs, and what a function makes of them in processes with limits.

A test of a kind of input gives some good examples and the function that a user's command calls with it. A mutated input
may be taken, or refused in one line (UserError, Malformed, Unusable); it must not raise anything else, hang, or leave
its process's limits.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcmlora.errors import UserError

FULL = int(os.environ.get("LCMLORA_FUZZ", "6000"))  # inputs of a slow test
QUICK = 40  # of the same test in the ordinary suite
SECONDS = 20.0
MEMORY = 3 << 30  # bytes of address space that a process may take besides what it begins with

_MAGIC = (
    *(
        b"\0",
        b"\xff",
        b"\n",
        b"\r\n",
        b"\t",
        b'"',
        b"'",
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"\\",
        b"/",
        b"../",
        b"%s",
    ),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1b[31m", b"<b>", b"[red]", b"null", b"NaN", b"1e999"),
    *(
        b"-1",
        b"0",
        b"9" * 4400,
        b"\x7f\xff\xff\xff",
        b"\x80\0\0\0",
        b"\xff" * 8,
        b"[" * 3000,
        b'{"a":' * 300,
        b"A" * 70000,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of an input: "taken", "refused", or a fault. For a fault, `why` is a traceback or a limit."""

    kind: str
    why: str = ""


def mutated(examples: Sequence[bytes], count: int, seed: int, words: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Yields `count` inputs, each one of the examples with one to eight changes; the same for the same seed.

    Args:
        words: pieces that matter to the format, put in besides those that matter to all.
    """
    chance = random.Random(seed)
    pieces = (*_MAGIC, *words)
    for _ in range(count):
        content = bytearray(chance.choice(examples))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            _change(content, chance, pieces, examples)
        yield bytes(content)


def _change(content: bytearray, chance: random.Random, pieces: Sequence[bytes], examples: Sequence[bytes]) -> None:
    # Half of the changes go to the beginning, where formats keep what they are.
    reach = len(content) if chance.random() < 0.5 else min(len(content), 512)
    here = chance.randrange(reach + 1)
    there = min(len(content), here + chance.choice((1, 1, 2, 4, 8, 64, 512)))
    kind = chance.randrange(8)
    if kind == 0 and here < len(content):
        content[here] ^= 1 << chance.randrange(8)
    elif kind == 1 and here < len(content):
        content[here] = chance.randrange(256)
    elif kind == 2:
        content[here:here] = chance.choice(pieces)
    elif kind == 3:
        content[here:there] = chance.choice(pieces)
    elif kind == 4:
        del content[here:there]
    elif kind == 5:
        del content[here:]
    elif kind == 6:
        content[here:here] = content[here:there] * chance.choice((1, 2, 50))
    else:
        other = chance.choice(examples)
        cut = chance.randrange(len(other) + 1)
        content[here:] = other[cut:]


def outcomes(
    function: Callable[[bytes], object],
    inputs: Iterator[bytes] | Sequence[bytes],
    *,
    refusals: tuple[type[BaseException], ...] = (),
    seconds: float = SECONDS,
    memory: int = MEMORY,
    workers: int = 1,
) -> Iterator[tuple[bytes, Outcome]]:
    """Yields every input with its outcome, in order.

    Args:
        function: of a module. It gets an input, and does with it what a user's command does.
        refusals: exceptions besides UserError that the caller turns into one line.
        seconds: of one input, after which it counts as a hang.
        memory: bytes that its process may take for it; MemoryError that comes through is a fault.
    """
    import multiprocessing

    from pebble import ProcessExpired, ProcessPool

    # Forked, so that what the test has imported is there at once; the limits are those of the child alone.
    with ProcessPool(
        max_workers=workers, context=multiprocessing.get_context("fork"), initializer=_limit, initargs=[memory]
    ) as pool:
        waiting: list[tuple[bytes, object]] = []

        def first() -> tuple[bytes, Outcome]:
            content, future = waiting.pop(0)
            try:
                return content, future.result()  # type: ignore[attr-defined]
            except TimeoutError:
                return content, Outcome("hung", f"took more than {seconds:g} seconds")
            except ProcessExpired as error:
                return content, Outcome("crashed", f"its process ended: {error}")

        for content in inputs:
            waiting.append((content, pool.schedule(_try, [function, content, refusals], timeout=seconds)))
            if len(waiting) > 4 * workers:
                yield first()
        while waiting:
            yield first()


def check(
    function: Callable[[bytes], object],
    inputs: Iterator[bytes] | Sequence[bytes],
    **limits: object,
) -> Counter[str]:
    """Returns how many inputs were taken and refused. Fails with the first inputs that were neither."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    for content, outcome in outcomes(function, inputs, **limits):  # type: ignore[arg-type]
        counts[outcome.kind] += 1
        if outcome.kind not in ("taken", "refused"):
            faults.append(f"{outcome.kind}: {len(content)} bytes, {content[:300]!r}\n{outcome.why}")
    assert not faults, f"{len(faults)} of {counts.total()} inputs: {dict(counts)}\n" + "\n".join(faults[:5])
    return counts


def _limit(memory: int) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # OpenMP's threads do not come along in a fork, and are waited for
    # A forked process begins with all that the test has mapped; below that not even a thread could start.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


def _try(function: Callable[[bytes], object], content: bytes, refusals: tuple[type[BaseException], ...]) -> Outcome:
    try:
        function(content)
    except (UserError, *refusals) as error:
        text = str(error)
        if not text.strip() or "\n" in text.strip() or "Traceback" in text:
            return Outcome("bad message", f"expected one line, got {text[:2000]!r}")
        if len(text) > 4000:
            return Outcome("bad message", f"a message of {len(text)} characters: {text[:200]!r}")
        return Outcome("refused", text)
    except BaseException:  # SystemExit as well: nothing may end the process
        return Outcome("raised", traceback.format_exc())
    return Outcome("taken")
