"""The process of `up`'s worker, whose runs get the newest environment variables and whose log is kept small.

python -m lcmlora.flows.servers.worker FILE worker start --pool POOL ...

A worker gives its own environment to the runs that it starts. FILE has the variables that may change, such as keys that
were rotated: `lcmlora up` writes it, and the worker reads it again. So neither the worker nor a run must be ended.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from lcmlora.flows import worker
from lcmlora.flows.servers import logs
from lcmlora.io.parsing import Malformed, parse_json

_SECONDS = 0.5  # between two looks


class Variables:
    """The environment variables of a file, in this process's environment."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: tuple[int, int] | None = None
        self._names: set[str] = set()

    def refresh(self) -> None:
        """Reads the file if it is another one. Variables that it has no more are unset.

        Raises:
            OSError: it cannot be read.
            Malformed: it is not what `lcmlora up` writes.
        """
        found = self._file.stat()
        if (now := (found.st_ino, found.st_mtime_ns)) == self._seen:
            return
        values = parse_json(self._file.read_bytes())
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise Malformed("no list of variables")
        for name in self._names - values.keys():
            os.environ.pop(name, None)
        os.environ.update(values)
        self._seen, self._names = now, set(values)


def _follow(variables: Variables) -> None:
    told = ""
    while True:
        time.sleep(_SECONDS)
        try:
            variables.refresh()
            told = ""
        except (OSError, Malformed) as error:
            if str(error) != told:
                print(f"runs get the variables that they got before: {error}", file=sys.stderr, flush=True)
            told = str(error)


def main() -> None:
    variables = Variables(Path(sys.argv[1]))
    variables.refresh()
    threading.Thread(target=_follow, args=(variables,), name="variables", daemon=True).start()
    logs.keep_small()
    worker.run(sys.argv[2:])


if __name__ == "__main__":
    main()
