"""Looking which stages are stale, and why: `python -P tasks/workspace/look.py RESOLVED STAGE ...` prints JSON.

It reads the project beside any other DVC and changes nothing. Stages whose files another DVC writes at the moment are
not looked at. RESOLVED is the text that resolved.yaml would have now, in a file; an empty name leaves the project's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lcmlora.io.parsing import JsonObject
from lcmlora.tasks import dvc_internals
from lcmlora.tasks.workspace import activity

_RESOLVED = "resolved.yaml"
_TRIES, _PAUSE = 5, 0.5  # reading dvc.lock and dvc.yaml, which DVC and lcmlora rewrite in place


def main(arguments: list[str]) -> int:
    """Prints what a `workspace.state.Workspace` is made of and returns the exit status."""
    from dvc.exceptions import DvcException

    resolved, *names = arguments
    for n in range(_TRIES):
        try:
            print(json.dumps(look(names, resolved), default=str))
            return 0
        except DvcException as error:
            if n == _TRIES - 1 or not _is_being_written(error):
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                return 1
            time.sleep(_PAUSE)
    return 1


def _is_being_written(error: BaseException) -> bool:
    """Returns whether a file could not be read as YAML: another DVC may be in the middle of writing it."""
    from dvc.utils.serialize import ParseError
    from dvc.utils.strictyaml import YAMLValidationError

    return isinstance(error, ParseError | YAMLValidationError) and "dvc.lock" in str(error)


def look(names: list[str], resolved: str) -> JsonObject:
    """Returns `stages`: the changes of each stage, or what it is `blocked` by; `running`: what runs now."""
    busy = activity.entries()
    with dvc_internals.without_locks() as repo:
        stages: JsonObject = {}
        for name in names:
            stage = _find(repo, name)
            if stage is None:
                stages[name] = {"changes": [{"what": "undefined"}]}
            elif pids := _writers(stage, busy):
                stages[name] = {"changes": [], "blocked": pids}
            else:
                stages[name] = {"changes": _changes(stage, resolved)}
        running = [
            _running(stage.addressing, entry.pid)
            for stage in repo.index.stages
            for entry in sorted(busy)
            if entry.writes and any(out.fs_path == entry.path for out in stage.outs)
        ]
    return {"stages": stages, "running": list({each["stage"]: each for each in running}.values())}


def _find(repo: Any, name: str) -> Any | None:
    from dvc.stage.exceptions import StageNotFound

    try:
        return repo.stage.collect(name)[0]
    except StageNotFound:
        return None


def _writers(stage: Any, busy: set[activity.Entry]) -> list[int]:
    """Returns the processes that write what the stage reads or writes."""
    own = [item.fs_path for item in (*stage.deps, *stage.outs)]
    return sorted({entry.pid for entry in busy if entry.writes and activity.overlap(entry.path, own)})


def _running(stage: str, pid: int) -> JsonObject:
    return {
        "stage": stage,
        "since": activity.since(pid, stage),
        "process": pid,
        "command": activity.command_of(pid),
        "run": activity.run_of(pid),
    }


def _changes(stage: Any, resolved: str) -> list[JsonObject]:
    """Returns what differs from the stage's last run, as DVC decides it; empty if it is up to date."""
    from dvc.dependency.param import ParamsDependency

    if not any(item.hash_info for item in (*stage.deps, *stage.outs)):
        return [{"what": "new"}]
    found: list[JsonObject] = [{"what": "command"}] if stage.changed_stage() else []
    for dep in () if stage.frozen else stage.deps:
        if isinstance(dep, ParamsDependency):
            found += _parameters(dep, resolved)
        else:
            found += [{"what": "input", "path": str(path), "how": how} for path, how in dep.status().items()]
    for out in stage.outs:
        found += [{"what": "output", "path": str(path), "how": how} for path, how in out.status().items()]
    return found


def _parameters(dep: Any, resolved: str) -> list[JsonObject]:
    if resolved and Path(dep.fs_path).name == _RESOLVED:
        dep.fs_path = str(Path(resolved).absolute())
    status = dep.status()
    if all(isinstance(how, str) for how in status.values()):  # the whole file is new or gone
        return [{"what": "input", "path": dep.def_path, "how": how} for how in status.values()]
    old, new = dep.hash_info.value or {}, dep.read_params()
    return [
        {"what": "parameter", "file": dep.def_path, "key": key}
        | ({"old": old[key]} if key in old else {})
        | ({"new": new[key]} if key in new else {})
        for keys in status.values()
        for key in keys
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
