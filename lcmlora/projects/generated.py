"""The generated files of a project, as text: what they hold follows from its settings, its options and this package.

`lcmlora init` writes them, and `lcmlora upgrade` writes them anew. This repository's own are the same
(tests/projects/test_generated.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping

from lcmlora.config import Config
from lcmlora.dvc_files import dvc_yaml, resolved
from lcmlora.project import Project
from lcmlora.projects import record
from lcmlora.projects.record import Options, Record, own_version
from lcmlora.projects.settings_reference import json_schema
from lcmlora.projects.templates import rendered, text

SCHEMA = ".lcmlora/params.schema.json"  # which editors find by the first line of params.yaml
RESOLVED = "resolved.yaml"  # which `lcmlora resolve` writes anew whenever a setting changes

# Files of which a project may have more lines than those that are generated.
BY_LINES = (".gitignore", ".dvcignore")

_EMOJI = "emoji"

_KUSTOMIZE = tuple(
    f"deploy/kubernetes/{folder}/{name}.yaml"
    for folder, names in {
        "base": ("kustomization", "project", "worker", "policies"),
        "servers": ("kustomization", "postgresql", "seaweedfs", "bucket", "prefect", "mlflow", "policies"),
        "serving": ("kustomization", "serve"),
        "ray": ("kustomization", "cluster", "images"),
    }.items()
    for name in names
)
_OVERLAYS = tuple(f"deploy/kubernetes/overlays/{name}/kustomization.yaml" for name in ("workers", "whole"))


def generated_files(config: Config, options: Options) -> dict[str, str]:
    """Returns the text of every generated file of a project, by its path relative to the project's folder.

    params.yaml is the person's own, and .lcmlora/project.json is the record of these files; neither is among them.

    Raises:
        UserError: settings do not fit, or two names would share one entry of resolved.yaml.
    """
    found = {
        ".dvcignore": rendered("dvcignore"),
        ".gitignore": rendered("gitignore", config=config),
        "dvc.yaml": dvc_yaml.whole(config, pretrain=options.from_source),
        "prefect.yaml": rendered("prefect.yaml", options=options),
        RESOLVED: resolved.text(config),
        SCHEMA: _schema(),
    }
    found |= dvc_yaml.folders(config)
    if "docker" in options.workers:
        found |= _as_they_are("deploy/docker/base-job-template.json", "deploy/compose/compose.yaml")
        found["deploy/compose/.gitignore"] = text("deploy/compose/gitignore")
        found["deploy/compose/example.env"] = rendered("deploy/compose/example.env", config=config, options=options)
    if "kubernetes" in options.workers:
        found |= _as_they_are("deploy/kubernetes/base-job-template.json", *_KUSTOMIZE)
        found |= {name: rendered(name, config=config, options=options) for name in _OVERLAYS}
    if options.workers:
        found |= _as_they_are("deploy/passwords.py")
    if not options.from_source:
        found |= _of_an_installed_package(config, options)
    return found


@functools.cache
def _schema() -> str:
    return json.dumps(json_schema(Config), indent=2) + "\n"


def _as_they_are(*names: str) -> dict[str, str]:
    return {name: text(name) for name in names}


def _of_an_installed_package(config: Config, options: Options) -> dict[str, str]:
    """Returns the files of a project whose lcmlora is installed and not its own source."""
    sources = {config.data_for(model).source for model in config.models}
    extras = ["pipeline", *([_EMOJI] if _EMOJI in sources else []), *sorted(options.workers)]
    if options.workers:
        extras.append("postgresql")  # of the servers that deploy/ has for them
    if config.publish.signing_key or config.publish.verify_key:
        extras.append("signing")
    requirement = f"lcmlora[{','.join(extras)}]=={own_version()}"
    prompt = "owl" if _EMOJI in sources else "a photo of a red fox"
    found = {
        "README.md": rendered("README.md", config=config, options=options, sources=sources, prompt=prompt),
        "requirements.txt": rendered("requirements.txt", requirement=requirement),
    }
    if options.workers:
        found["deploy/Dockerfile"] = text("deploy/Dockerfile")
        found["deploy/README.md"] = rendered("deploy/README.md", config=config, options=options)
    return found


def recorded(files: Mapping[str, str], options: Options) -> Record:
    """Returns the record of files that were generated with these options by this version."""
    digests = {path: digest(content) for path, content in sorted(files.items()) if path != RESOLVED}
    return Record(lcmlora=own_version(), options=options, files=digests)


def refresh_dvc_yaml(config: Config, project: Project) -> bool:
    """Writes the stages of dvc.yaml anew that follow params.yaml; returns whether they did not.

    If nobody has edited the file before, the record says so of the new text, too.

    Raises:
        UserError: dvc.yaml or the record cannot be read, or dvc.yaml is not laid out as lcmlora's.
    """
    path, place = project.dvc_yaml, "dvc.yaml"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not dvc_yaml.refresh(config, project):
        return False
    if (project.root / record.PLACE).is_file():
        kept = record.read(project.root)
        if kept.files.get(place) == digest(before):
            files = kept.files | {place: digest(path.read_text(encoding="utf-8"))}
            kept.model_copy(update={"files": files}).write(project.root)
    return True


def with_lines(before: str, wanted: str) -> str:
    """Returns the text of a file of lines, with those that it lacks of the wanted ones at its end."""
    lacking = [line for line in wanted.splitlines() if line not in before.splitlines()]
    head = before if before.endswith("\n") or not before else before + "\n"
    return head + "".join(f"{line}\n" for line in lacking)


def digest(content: str) -> str:
    """Returns the SHA-256 of a generated file, as the record has it."""
    return hashlib.sha256(content.encode()).hexdigest()
