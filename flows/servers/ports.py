"""Ports of this machine: which are free, who listens on them, and choosing some that nobody else chooses meanwhile.

A port may be taken between the moment it is chosen and the moment a server listens on it. So `up` of this user hold
theirs against each other, and a server counts as started only when its own processes listen on its ports.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil

from lcmlora.io.private import runtime_folder

HOST = "127.0.0.1"
_TRIES = 1000  # of ports that other `up` hold


class Taken(Exception):
    """Another process has a port that a server was to have.

    Args:
        service: the server's name.
    """

    def __init__(self, service: str) -> None:
        super().__init__(service)
        self.service = service


class Chooser:
    """Chooses ports and holds them against the `up` of other projects until the block ends.

    Args:
        file: is locked byte by byte, one for each port; by default one of this user and machine.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = (file or runtime_folder() / "ports").open("a+b")

    def __enter__(self) -> Chooser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()  # which unlocks it

    def take(self, port: int) -> bool:
        """Returns whether the port is free and is held from now on."""
        return self.hold(port) and is_free(port)

    def hold(self, port: int) -> bool:
        """Returns whether no other `up` holds the port; it is held from now on."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def free(self, count: int) -> list[int]:
        """Returns this many free ports.

        Raises:
            OSError: there are none.
        """
        chosen: list[int] = []
        for _ in range(_TRIES):
            (port,) = free_ports(1)
            if port not in chosen and self.take(port):
                chosen.append(port)
            if len(chosen) == count:
                return chosen
        raise OSError(errno.EADDRINUSE, f"{HOST} has no {count} free ports")


def free_ports(count: int) -> list[int]:
    """Returns ports that are free at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((HOST, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def is_free(port: int) -> bool:
    """Returns whether a server could listen on the port, and nobody listens on it at ::1, which may be `localhost`."""
    return _could_listen(socket.AF_INET, HOST, port) and _could_listen(socket.AF_INET6, "::1", port)


def _could_listen(family: socket.AddressFamily, host: str, port: int) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore a former server's closing connections
            probe.bind((host, port))
    except OSError as error:
        return family == socket.AF_INET6 and error.errno != errno.EADDRINUSE  # a machine without IPv6
    return True


def listening(pids: Iterable[int]) -> set[int]:
    """Returns the ports of this machine on which these processes, or their children, listen."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(pid)
            for process in (leader, *leader.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    sockets = process.net_connections("tcp4")
                    found |= {
                        each.laddr.port
                        for each in sockets
                        if each.status == psutil.CONN_LISTEN and each.laddr.ip == HOST
                    }
    return found


def are_others(ports: Iterable[int], pid: int) -> bool:
    """Returns whether somebody other than this process and its children listens on one of these ports."""
    occupied = {port for port in ports if not is_free(port)}
    return bool(occupied) and not occupied <= listening([pid])  # asked last: it may have begun to listen meanwhile
