"""The environment variables of `lcmlora up`: those of its shell, those it hands on to runs, those of other servers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

from lcmlora.io.parsing import Malformed, parse_json

FOLDER = "LCMLORA_SERVERS"  # the folder .up/ whose file `environment` a shell has sourced
_OURS = ("LCMLORA_UP", "LCMLORA_LOG", "LCMLORA_PROJECT", FOLDER)
# What a run may need from the person's shell: keys of stores, of the hub, of a tracking server, and settings.
_GROUPS = ("AWS_", "HF_", "MLFLOW_", "LCMLORA_", "OMP_")
_SERVERS = {  # by the variable that names a server, all that belong to it
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_",),
    "AWS_ENDPOINT_URL": ("AWS_", "LCMLORA_PUBLISH_TO"),
    "PREFECT_API_URL": ("PREFECT_API_",),
}


def forget_sourced(environment: MutableMapping[str, str], folder: Path, exported: Mapping[str, str]) -> str | None:
    """Removes the variables that a sourced `.up/environment` has set, of this project or another one.

    They name servers that `up` starts itself, perhaps at ports of before. What a person has set beside them stays.

    Args:
        folder: this project's .up/.
        exported: what its file has.

    Returns:
        The folder of another project whose servers the shell names, None where there is none.
    """
    other = environment.pop(FOLDER, None)
    for name, value in exported.items():
        if environment.get(name) == value:
            del environment[name]
    if other is None:
        return None
    for name, value in _exported_by(Path(other)).items():
        if environment.get(name) == value:
            del environment[name]
    for named, prefixes in _SERVERS.items():  # a file of before, whose servers have other ports now
        if urlsplit(environment.get(named, "")).hostname == "127.0.0.1":
            for name in [name for name in environment if name.startswith(prefixes)]:
                del environment[name]
    return other if Path(other) != folder else None


def _exported_by(folder: Path) -> dict[str, str]:
    try:
        exported = parse_json((folder / "state.json").read_bytes())["exported"]
    except (OSError, Malformed, KeyError, TypeError):  # it was deleted, or another user's
        return {}
    return {str(name): str(value) for name, value in exported.items()} if isinstance(exported, dict) else {}


def given(
    environment: Mapping[str, str], before: Mapping[str, str], own_store: bool, named: Collection[str] = ()
) -> dict[str, str]:
    """Returns the variables that runs get from the person's shell.

    A group of them, such as all that begin with AWS_, is taken from the shell where it has one of them, and otherwise
    stays as it was: a crontab has no keys.

    Args:
        before: what runs got so far.
        named: variables that the settings name.
        own_store: whether `up` starts a store itself, to which the keys of others do not belong.
    """
    found: dict[str, str] = {}
    for group in _GROUPS:
        if group == "AWS_" and own_store:
            continue
        now = _of_group(environment, group)
        found |= now or _of_group(before, group)
    for name in named:
        if value := environment.get(name, before.get(name)):
            found[name] = value
    return found


def named(params: str) -> set[str]:
    """Returns the variables that the text of a params.yaml names, as env:NAME, for what is secret."""
    return set(re.findall(r"\benv:([A-Za-z_][A-Za-z0-9_]*)", params))


def _of_group(variables: Mapping[str, str], group: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(group) and name not in _OURS}


def as_json(variables: Mapping[str, str]) -> str:
    """Returns the text of the file that a worker reads its runs' variables from."""
    return json.dumps(dict(sorted(variables.items())), indent=2)
