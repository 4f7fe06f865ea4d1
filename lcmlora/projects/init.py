"""A new project: what is written where, and the writing of it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lcmlora import config
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write, make_folder
from lcmlora.io.parsing import JsonObject
from lcmlora.io.terminal import note
from lcmlora.project import PARAMS
from lcmlora.projects import demo_files, generated, record, repositories
from lcmlora.projects.choices import EMOJI, Base
from lcmlora.projects.record import Options, Workers
from lcmlora.projects.templates import rendered

_KEPT = ("README.md",)  # a person's own, where there is one


@dataclass(frozen=True)
class Plan:
    """A project that is not written yet.

    own: the texts of the files that are the person's from now on, by path: params.yaml, and all of a demo.
    generated: the texts of the files that `lcmlora upgrade` will write anew.
    """

    root: Path
    settings: Config
    options: Options
    own: dict[str, str]
    generated: dict[str, str]

    @property
    def texts(self) -> dict[str, str]:
        """The texts of all files but the record, by path."""
        return self.own | self.generated

    @property
    def is_demo(self) -> bool:
        """Whether it is the demo, the emoji base with its own data."""
        return list(self.settings.models) == [EMOJI] and self.settings.data.source == EMOJI

    @property
    def written(self) -> list[str]:
        """The paths of the files that it writes, sorted; of the demo's weights their folders."""
        return sorted({*self.texts, record.PLACE, *(map(str, demo_files.WEIGHTS) if self.is_demo else ())})


def refuse_a_project(root: Path) -> None:
    """Raises UserError if the folder is a project already."""
    if (root / record.PLACE).exists():
        raise UserError(
            f"{root}: is a project already; edit its {PARAMS}, and bring its generated files up to date by "
            "`lcmlora upgrade`"
        )


def plan_demo(root: Path, publish: str | None, workers: tuple[Workers, ...]) -> Plan:
    """Returns the plan of the demo: the emoji base with its data and settings.

    Args:
        publish: `publish.to`; None for the default.

    Raises:
        UserError: the folder has files in the way.
    """
    texts = demo_files.texts()
    return _plan(root, texts | {PARAMS: texts[PARAMS] + _published(publish)}, workers)


def plan_project(root: Path, base: Base, data: JsonObject, publish: str | None, workers: tuple[Workers, ...]) -> Plan:
    """Returns the plan of a project that makes the adapter of one base.

    Args:
        data: `data.source` and `data.path`.
        publish: `publish.to`; None for the default.

    Raises:
        UserError: settings do not fit, or the folder has files in the way.
    """
    return _plan(root, {PARAMS: rendered(PARAMS, base=base, data=data) + _published(publish)}, workers)


def _published(to: str | None) -> str:
    """Returns the end of params.yaml with the store of releases; empty for the default."""
    return "" if to is None else rendered("publish.yaml", publish=to)


def _plan(root: Path, own: dict[str, str], workers: tuple[Workers, ...]) -> Plan:
    settings = _checked(own[PARAMS], root)
    options = Options(name=root.resolve().name, workers=workers)
    files = generated.generated_files(settings, options)
    kept = [path for path in _KEPT if _is_in_the_way(root / path, files[path])]
    plan = Plan(root, settings, options, own, {path: text for path, text in files.items() if path not in kept})
    _refuse_what_is_in_the_way(plan)
    return plan


def _checked(text: str, root: Path) -> Config:
    """Returns the settings of this params.yaml. Raises UserError as if it stood in the project."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PARAMS)
        path.write_text(text, encoding="utf-8")
        try:
            return config.load(path, root)
        except UserError as error:
            raise UserError(str(error).replace(f"{path}: ", "")) from None


def _refuse_what_is_in_the_way(plan: Plan) -> None:
    """Raises UserError if a file of the project would overwrite one with other content."""
    if plan.root.exists() and not plan.root.is_dir():
        raise UserError(f"{plan.root}: is a file; name a folder")
    placed = {path: text for path, text in plan.texts.items() if path not in generated.BY_LINES}
    in_the_way = sorted(path for path, text in placed.items() if _is_in_the_way(plan.root / path, text))
    if plan.is_demo:
        in_the_way += demo_files.weights_in_the_way(plan.root)
    if in_the_way:
        raise UserError(
            f"{plan.root}: has {', '.join(in_the_way)}, which a project has, too; nothing is overwritten: name another "
            "folder, such as one below this, or move them"
        )


def _is_in_the_way(path: Path, text: str) -> bool:
    """Returns whether something other than a file with this text has the path."""
    return os.path.lexists(path) and not (path.is_file() and path.read_bytes() == text.encode())


def write(plan: Plan) -> None:
    """Writes the project: its files, a Git repository if it lies in none, and DVC's folder.

    A new Git repository gets a first commit; in one that is there, the files are left for the person to commit. The
    record comes last: what was interrupted before is written again by the same command.

    Raises:
        UserError: a file cannot be written, Git or DVC failed, or the artwork of the demo cannot be installed.
    """
    root = plan.root
    make_folder(root)
    repository = repositories.repository_of(root) if repositories.has_git() else None
    is_new = repository is None and repositories.has_git()
    if is_new:
        repositories.init_git(root)
        repository = root
    elif repository is None:
        note("Git is not installed, so the project has no history; DVC works without it", "warning: ")
    lines = {path: root / path for path in generated.BY_LINES}
    before = {path: file.read_text(encoding="utf-8") if file.is_file() else "" for path, file in lines.items()}
    repositories.init_dvc(root, repository)  # which writes a .dvcignore of its own
    for path, text in plan.texts.items():
        _write(root / path, generated.with_lines(before[path], text) if path in before else text)
    if plan.is_demo:
        demo_files.copy_weights(root)
        demo_files.copy_cache(root)
    generated.recorded(plan.generated, plan.options).write(root)
    if is_new:
        _commit(plan)
    elif repository is not None:
        note(f"the project belongs to the Git repository {repository}; commit its files there")
    if plan.is_demo:
        repositories.install_artwork(root)


def _write(path: Path, text: str) -> None:
    make_folder(path.parent)
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def _commit(plan: Plan) -> None:
    own = [*plan.written, ".dvc/config", ".dvc/.gitignore"]
    if reason := repositories.commit(plan.root, own, "Make a project of lcmlora"):
        note(f"the files are staged, and not committed: {reason}", "warning: ")
