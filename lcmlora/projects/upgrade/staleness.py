"""Which stages of a project would run again, and why: what dvc.lock says of their last run against what they would get.

Only what an upgrade changes is looked at: versions of algorithms, settings, commands, the lists of inputs and outputs.
Whether a person has changed the files themselves is DVC's question (`dvc status`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcmlora import stages
from lcmlora.config import SECTIONS, Config
from lcmlora.dvc_files import resolved
from lcmlora.dvc_files.expansion import Stage
from lcmlora.io.parsing import JsonObject
from lcmlora.projects.upgrade import former, history
from lcmlora.projects.upgrade.history import StageVersion
from lcmlora.settings import layers
from lcmlora.stages import Run

_ALGORITHMS = "algorithms"  # of an entry of resolved.yaml: the versions
_RESOLVED = "resolved.yaml"


@dataclass(frozen=True)
class Setting:
    """A decisive setting that differs from that of the last run; None where one of the two had none."""

    key: str  # distill.gamma
    old: Any
    new: Any
    origin: str  # default, preset sdxl, params.yaml bases.emoji.distill; empty where that is not known


@dataclass(frozen=True)
class Stale:
    """A stage that will run again. It has run before; a stage that never ran is not stale but new."""

    name: str  # encode@emoji
    run: Run
    versions: list[StageVersion]  # of its algorithm and of those that it contains, since its last run
    settings: list[Setting]
    others: list[str]  # other reasons, in words
    after: list[str]  # stale or new stages whose outputs it reads
    steps: float  # training steps of the new run for each one of the last run; 1 for stages that do not train


@dataclass(frozen=True)
class Outlook:
    """What an upgrade makes stale."""

    stale: list[Stale]
    new: list[str]  # stages of models that have run, and which the former version did not have
    never_run: list[str]  # models none of whose stages has run


def outlook(described: Sequence[Stage], lock: JsonObject, config: Config) -> Outlook:
    """Returns which of these stages would run again.

    Args:
        described: the stages of the new dvc.yaml.
        lock: dvc.lock as it is now.

    Raises:
        UserError: the settings do not fit.
    """
    recorded: dict[str, JsonObject] = lock.get("stages", {})
    by_entry = {resolved.entry_name(run): run for run in stages.runs(config)}
    concerned = [(stage, by_entry[stage.entry]) for stage in described if stage.entry in by_entry and not stage.frozen]
    begun = {run.model for stage, run in concerned if stage.name in recorded}
    stale: dict[str, Stale] = {}
    new: list[str] = []
    for stage, run in _ordered(concerned):
        after = [
            other.name
            for other, _ in concerned
            if (other.name in stale or other.name in new) and _reads(stage, other.outputs)
        ]
        if stage.name not in recorded:
            new += [stage.name] if run.model in begun else []
            continue
        found = _compared(stage, run, recorded[stage.name], config, after)
        if found.versions or found.settings or found.others or after:
            stale[stage.name] = found
    never = [model for model in config.models if model not in begun]
    return Outlook(list(stale.values()), new, never)


def _ordered(concerned: Sequence[tuple[Stage, Run]]) -> Iterator[tuple[Stage, Run]]:
    """Yields each stage after those whose outputs it reads."""
    left = list(concerned)
    while left:
        ready = [
            each for each in left if not any(_reads(each[0], other.outputs) for other, _ in left if other != each[0])
        ]
        yield from ready or left  # of a circle, which DVC refuses, in the order of dvc.yaml
        left = [each for each in left if each not in ready] if ready else []


def _reads(stage: Stage, outputs: Sequence[str]) -> bool:
    """Returns whether an input of the stage is one of these outputs, lies in one or holds one."""
    return any(f"{one}/".startswith(f"{other}/") for path in stage.inputs for out in outputs for one, other in (
        (path, out), (out, path))
    )  # fmt: skip


def _compared(stage: Stage, run: Run, recorded: JsonObject, config: Config, after: list[str]) -> Stale:
    params = recorded.get("params", {})
    entry = {_ALGORITHMS: stages.algorithms(run.stage)} | stages.decisive_settings(config, run)
    if _RESOLVED in params:
        old = params[_RESOLVED].get(stage.entry) or {}
        versions, others = _newer(old.get(_ALGORITHMS, {}), entry[_ALGORITHMS]), []
        settings = list(_differing(old, entry, config, run))
    else:
        old = former.entry(params.get(former.PARAMS, {}), run)
        versions, others = _newer({}, entry[_ALGORITHMS]), ["it last ran by lcmlora 0.1.0, which numbered no stages"]
        # 0.1.0 recorded what params.yaml said, and no defaults: a key on one side alone is no change.
        settings = [each for each in _differing(old, entry, config, run) if each.old is not None is not each.new]
    others += _lists(stage, recorded)
    if not (versions or settings or others) and recorded.get("cmd") != stage.command:
        others.append(f"its command is now `{stage.command}`")
    return Stale(stage.name, run, versions, settings, others, after, _steps(old, entry))


def _newer(old: Mapping[str, int], new: Mapping[str, int]) -> list[StageVersion]:
    """Returns the versions that came since the last run. One without a line of history has an empty one."""
    found = []
    for name, version in new.items():
        if old.get(name) == version:
            continue
        known = [each for each in history.since(name, old.get(name)) if each.version <= version]
        found += known or [StageVersion(name, version, "", "another version than that of the last run")]
    return found


def _differing(old: JsonObject, new: JsonObject, config: Config, run: Run) -> Iterator[Setting]:
    before, now = dict(_leaves(old)), dict(_leaves(new))
    for keys in (*now, *(key for key in before if key not in now)):
        if keys[0] != _ALGORITHMS and (keys not in before or keys not in now or before[keys] != now[keys]):
            section = {"training": run.stage}.get(keys[0], keys[0])
            origin = _origin(config, run, section, keys[1:]) if keys in now else ""
            yield Setting(".".join((section, *keys[1:])), before.get(keys), now.get(keys), origin)


def _leaves(values: JsonObject, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), list(value) if isinstance(value, tuple) else value


def _origin(config: Config, run: Run, section: str, keys: tuple[str, ...]) -> str:
    """Returns where the value of a setting comes from; empty where that is not known."""
    if not keys:
        return ""
    if run.model is None or section not in (*SECTIONS, "data"):
        values = getattr(config, section, None)
        written = section != "base" and values is not None and keys[0] in getattr(values, "model_fields_set", ())
        return f"params.yaml {section}" if written else "" if section == "base" else "default"
    found = config.layers_of(section, run.model)
    for depth in range(len(keys), 0, -1):
        if any(layer.has(keys[:depth]) for layer in found):
            origin = layers.origin(found, keys[:depth])
            return origin if origin.startswith("preset ") else f"params.yaml {origin}"
    return "default"


def _lists(stage: Stage, recorded: JsonObject) -> Iterator[str]:
    """Yields how the inputs and outputs differ from those of the last run."""
    for kind, paths, verb in (("deps", stage.inputs, "reads"), ("outs", stage.outputs, "writes")):
        before = {str(each["path"]) for each in recorded.get(kind, ())}
        more = [path for path in paths if path not in before]
        less = [path for path in sorted(before - {*paths}) if not former.is_source_file(path)]
        if more or less:
            told = [*more, *(f"no more {path}" for path in less)]
            yield f"it {verb} {', '.join(told)}"


def _steps(old: JsonObject, new: JsonObject) -> float:
    """Returns how many pictures a training goes through for each one of the last run."""

    def pictures(entry: JsonObject) -> float:
        training = entry.get("distill") or entry.get("training") or {}
        steps, batch = training.get("steps"), training.get("batch")
        return float(steps * batch) if isinstance(steps, int) and isinstance(batch, int) else 0.0

    return pictures(new) / pictures(old) if pictures(old) and pictures(new) else 1.0
