"""Messages that wait for a receiver: each is kept before it is sent, and forgotten when the receiver has it."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from lcmlora import masking
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows.memory import Memory
from lcmlora.flows.notices.delivery import Refused, deliver
from lcmlora.flows.notices.message import Message
from lcmlora.io.terminal import joined

SUBJECT = "outbox"  # of the memory: an entry for each message and receiver

_KEPT_DAYS = 3


def put(message: Message, targets: Iterable[str], settings: Config) -> None:
    """Keeps a message for these targets."""
    memory = Memory(SUBJECT, settings)
    for name in targets:
        # The time of a message is in whole seconds.
        memory.write(_key(message, name), {"target": name, "kept": time.time_ns(), "message": message.document})


def take(message: Message, targets: Iterable[str], settings: Config) -> None:
    """Forgets a message that these targets have."""
    memory = Memory(SUBJECT, settings)
    for name in targets:
        memory.forget(_key(message, name))


def send(
    message: Message, targets: list[str], settings: Config, warn: Callable[[str], None], *, kept: bool = True
) -> list[str]:
    """Delivers a message to these targets side by side, and returns those that have taken it.

    It takes `notify.seconds` at most.

    Args:
        warn: is called with a line for each of the others.
        kept: the message is in the outbox, so that it is sent again later.
    """
    until = time.monotonic() + settings.notify.seconds
    faults: dict[str, str | None] = dict.fromkeys(targets, "no answer in time")

    def attempt(name: str) -> None:
        try:
            deliver(message, settings.notify.targets[name], until, partial(faults.__setitem__, name))
            faults[name] = None
        except (Refused, UserError) as error:
            faults[name] = str(error)
        except Exception as error:  # of a service's own code; whatever it is, it must not end a run
            faults[name] = joined(masking.text(f"{type(error).__name__}: {error}"), 300)

    # Threads that do not keep the process: a receiver that never answers is left behind.
    threads = [threading.Thread(target=attempt, args=(name,), daemon=True) for name in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    ended = dict(faults)  # what a thread still does after this is not looked at
    for name, fault in ended.items():
        if fault is not None:
            again = f"; `watch` tries again for {_KEPT_DAYS} days" if kept else ""
            warn(f"notify.targets.{name}: {fault}{again}")
    return [name for name, fault in ended.items() if fault is None]


def retry(settings: Config, warn: Callable[[str], None]) -> int:
    """Delivers what still waits, the oldest first, and returns how much was delivered.

    A target that does not take one message gets no other one in this call.
    """
    memory, delivered, down = Memory(SUBJECT, settings), 0, set[str]()
    oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=_KEPT_DAYS)
    waiting = sorted(memory.read().items(), key=lambda item: int(item[1]["kept"]))
    for key, entry in waiting:
        message, name = Message(entry["message"]), entry["target"]
        if datetime.datetime.fromisoformat(message.document["time"]) < oldest:
            warn(f"notify.targets.{name}: {message.subject}: given up after {_KEPT_DAYS} days")
            memory.forget(key)
        elif name not in settings.notify.targets:
            memory.forget(key)
        elif name not in down:
            if send(message, [name], settings, warn):
                memory.forget(key)
                delivered += 1
            else:
                down.add(name)
    return delivered


def _key(message: Message, target: str) -> str:
    return f"{message.id} {target}"
