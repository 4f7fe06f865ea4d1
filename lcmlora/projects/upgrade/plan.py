"""What an upgrade of a project would do, found out before anything is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcmlora import config
from lcmlora.config import Config
from lcmlora.dvc_files import expansion, resolved
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.io.parsing import Malformed, as_object, decoded, parse_yaml, read_bytes, read_yaml
from lcmlora.project import Project
from lcmlora.projects import generated, record
from lcmlora.projects.record import Options, Record
from lcmlora.projects.upgrade import former, git, staleness
from lcmlora.projects.upgrade.conversions import Converted, convert
from lcmlora.projects.upgrade.staleness import Outlook
from lcmlora.projects.upgrade.yaml_text import YamlText

BESIDE = ".new"  # the ending of a file that goes beside one that a person has edited
_RECORDED_SINCE = (0, 2, 0)  # the release that writes .lcmlora/project.json

Action = Literal["write", "merge", "beside", "keep"]


@dataclass(frozen=True)
class FileChange:
    """A generated file, and what becomes of it.

    write: it is new, or nobody has edited it. merge: it has edits, which the new text takes over. beside: it has edits
    that contradict the new text, which is written beside it. keep: it is as it should be, or it belongs to the person,
    who made it, deleted it or is the only one that changed it.
    """

    path: str
    action: Action
    text: str  # that is written
    before: str | None  # None where there is no file

    @property
    def belongs_to_person(self) -> bool:
        """Returns whether it stays as it is, though another text is generated."""
        return self.action == "keep" and self.text != self.before

    @property
    def is_change(self) -> bool:
        """Returns whether something is written."""
        return self.action == "beside" or (self.action in ("write", "merge") and self.text != self.before)


@dataclass(frozen=True)
class Upgrade:
    """What an upgrade would do."""

    project: Project
    made_by: str  # the release that the project is of
    settings: Config  # as they will be
    params: str  # the text of params.yaml, as it will be
    converted: list[Converted]  # settings that change their names or meanings
    files: list[FileChange]
    unused: list[str]  # files and folders that nothing needs any more, and that stay
    record: Record
    outlook: Outlook

    @property
    def changes_params(self) -> bool:
        """Returns whether params.yaml becomes another."""
        return self.params != _text(self.project.params_file)

    @property
    def beside(self) -> list[str]:
        """Returns the files that stay as a person has edited them, whose new text is for the person to merge."""
        return [change.path for change in self.files if change.action == "beside"]

    @property
    def is_needed(self) -> bool:
        """Returns whether there is anything to write."""
        return (
            self.changes_params
            or any(change.is_change for change in self.files)
            or self.record != _record_of(self.project)
            or not resolved.is_current(self.settings, self.project.resolved)
        )


def plan_upgrade(project: Project) -> Upgrade:
    """Returns what an upgrade to the installed version would do.

    Raises:
        UserError: the folder is no project, the project was made by a later version, or settings do not fit that no
            conversion is known for.
    """
    if not project.params_file.is_file() or not project.dvc_yaml.is_file():
        raise UserError(
            f"{project.root}: has no params.yaml and dvc.yaml, so it is no project; `lcmlora init` makes one"
        )
    kept = _record_of(project)
    made_by = _release(project, kept)
    _refuse_later(made_by)
    params = YamlText(_text(project.params_file), str(project.params_file))
    converted = convert(params, _numbers(made_by))
    if kept is None and "yaml-language-server" not in params.text:
        params.prepend(f"# yaml-language-server: $schema={generated.SCHEMA}\n")
    path = project.params_file
    settings = config.parse(config.values(params.text, path), path, project.root)
    options = kept.options if kept else _options(project)
    texts = generated.generated_files(settings, options)
    files = [_file_change(project, path, text, kept) for path, text in texts.items() if path != generated.RESOLVED]
    stages = expansion.expanded(as_object(parse_yaml(texts["dvc.yaml"]), "dvc.yaml"), params.values)
    lock = as_object(read_yaml(project.dvc_lock), str(project.dvc_lock)) if project.dvc_lock.is_file() else {}
    theirs = {change.path for change in files if change.belongs_to_person and not _was_generated(change.path, kept)}
    return Upgrade(
        project,
        made_by,
        settings,
        params.text,
        converted,
        files,
        _unused(project, kept, set(texts)),
        generated.recorded({path: text for path, text in texts.items() if path not in theirs}, options),
        staleness.outlook(stages, lock, settings),
    )


def refuse_losses(upgrade: Upgrade) -> None:
    """Raises UserError if something would be overwritten that Git cannot bring back, or a text of a former upgrade."""
    root = upgrade.project.root
    written = [change.path for change in upgrade.files if change.is_change and change.action != "beside"]
    params = [upgrade.project.params_file.name] if upgrade.changes_params else []
    git.check_clean(root, [*params, record.PLACE, *written])
    for path in upgrade.beside:
        if (root / (path + BESIDE)).exists():
            raise UserError(
                f"{root / path}{BESIDE}: is left from a former upgrade; merge it into {path}, and delete it"
            )


def apply(upgrade: Upgrade) -> None:
    """Writes what the plan says. What was there before is in Git.

    Raises:
        UserError: as `refuse_losses`; nothing is written then.
    """
    refuse_losses(upgrade)
    root = upgrade.project.root
    if upgrade.changes_params:
        _write(upgrade.project.params_file, upgrade.params)
    for change in upgrade.files:
        if change.is_change:
            _write(root / (change.path + (BESIDE if change.action == "beside" else "")), change.text)
    resolved.refresh(upgrade.settings, upgrade.project.resolved)
    upgrade.record.write(root)  # last, so that an upgrade that was killed is not taken for a whole one


def _unused(project: Project, kept: Record | None, generated_now: set[str]) -> list[str]:
    """Returns the files that were generated and are no more, or the folders of the code of 0.1.0."""
    if kept is None:
        return [f"{name}/" for name in former.CODE if (project.root / name).is_dir()]
    return [path for path in sorted(kept.files.keys() - generated_now) if (project.root / path).is_file()]


def _file_change(project: Project, path: str, text: str, kept: Record | None) -> FileChange:
    file = project.root / path
    if not file.is_file():
        deleted = _was_generated(path, kept) and not path.startswith(".lcmlora/")
        return FileChange(path, "keep" if deleted else "write", text, None)
    before = _text(file)
    if path in generated.BY_LINES:
        return FileChange(path, "write", generated.with_lines(before, text), before)
    if before == text:
        return FileChange(path, "keep", text, before)
    digest = _generated_before(path, kept)
    if digest is None or digest == generated.digest(text):
        return FileChange(path, "keep", text, before)
    if digest == generated.digest(before):
        return FileChange(path, "write", text, before)
    base = git.find(project.root, path, lambda found: generated.digest(found) == digest)
    merged = git.merged(before, base, text) if base is not None else None
    return FileChange(path, "beside", text, before) if merged is None else FileChange(path, "merge", merged, before)


def _generated_before(path: str, kept: Record | None) -> str | None:
    """Returns the digest of a file as it was generated; None of a file that the person made."""
    return (kept.files if kept else former.FILES).get(path)


def _was_generated(path: str, kept: Record | None) -> bool:
    return _generated_before(path, kept) is not None


def _record_of(project: Project) -> Record | None:
    return record.read(project.root) if (project.root / record.PLACE).is_file() else None


def _release(project: Project, kept: Record | None) -> str:
    """Returns the release that a project is of. Those of 0.1.0 have neither a record nor resolved.yaml."""
    if kept is None:
        return "0.1.0" if not project.resolved.is_file() else _dotted(_RECORDED_SINCE)
    return _dotted(max(_numbers(kept.lcmlora), _RECORDED_SINCE))


def _refuse_later(made_by: str) -> None:
    if _numbers(made_by) > max(_numbers(record.own_version()), _RECORDED_SINCE):
        raise UserError(
            f"the project is of lcmlora {made_by}, and this is {record.own_version()}; install that one, or a later one"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version, without what follows them: 0.2.0.dev1 is 0.2.0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _options(project: Project) -> Options:
    """Returns the options of a project of 0.1.0, which kept none: a clone of lcmlora's own repository."""
    pools = [pool for pool in ("docker", "kubernetes") if (project.root / "deploy" / pool).is_dir()]
    return Options.model_validate({"name": project.root.resolve().name, "workers": pools})


def _text(path: Path) -> str:
    try:
        return decoded(read_bytes(path))
    except Malformed as error:
        raise UserError(f"{path}: is {error}") from None


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
