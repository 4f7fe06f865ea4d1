"""dvc.yaml: the whole of it for a new project, and the stages that follow params.yaml.

dvc.yaml is the same for all projects whose models share one data set, but for the stages of `study` and of
`compatibility`, which only a project with these settings has: a template of DVC must not name a setting that is not
there. Where a base has `data` of its own, the stages that read pictures list every model with its folder (`foreach`),
since a template of DVC cannot look up a model's folder in a matrix of models. So does `distill` where an adapter is
polished: it is then distilled to another folder, and `polish` writes the one that all other stages read. Names and
commands of the stages are the same in both forms, so that other models' stages do not become stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.io.parsing import as_object, parse_yaml, read_yaml
from lcmlora.io.terminal import shown
from lcmlora.project import Project
from lcmlora.stages import polished

_PREPARING = ("prepare", "prepare-own")
_READING = ("encode", "reference", "evaluate")
_STUDYING = ("style", "finetune", "style-alone", "finetune-alone", "study")
# The stages of each section that a project may lack. `package` depends on the section's folder.
_OPTIONAL = {"study": _STUDYING, "compatibility": ("compatibility",)}
_STAGES = (*_PREPARING, *_READING, *_STUDYING, "compatibility", "package")  # which depend on params.yaml
_POLISHING = ("distill", "polish")  # which depend on it, too, where there is `distill.polish` or was
_ORDER = (
    *("resolve", "pretrain", "prepare", "prepare-own", "encode", "reference", "distill", "polish", "evaluate"),
    *(*_STUDYING, "compatibility", "package"),
)

# The file by which Git has the folder of such a section, that `package` depends on before there is anything in it.
_FOLDERS = {"study": ("study/.gitignore", "/*\n!/.gitignore\n"), "compatibility": ("compatibility/.gitkeep", "")}

_BEGIN = re.compile(r"^(?=  [\w-]+:)", re.MULTILINE)  # of a stage


def whole(config: Config, *, pretrain: bool = False) -> str:
    """Returns the text of dvc.yaml of a new project with these settings.

    Args:
        pretrain: with the stage that makes the emoji base, which only lcmlora's own repository has.
    """
    head, *_ = _paragraphs()
    found = {_stage_of(block): block for block in _paragraphs()[1:]} | _polishing(config) | _wanted(config)
    left_out = {*(() if pretrain else ("pretrain",)), *_without(config)}
    return "\n".join([head, *(found[name] for name in _ORDER if name in found and name not in left_out)])


def check(config: Config, project: Project) -> None:
    """Raises UserError where dvc.yaml does not have the stages that params.yaml asks for."""
    if project.dvc_yaml.is_file() and (difference := _difference(config, _stages(read_yaml(project.dvc_yaml)))):
        raise UserError(f"{project.dvc_yaml}: {difference}; run `lcmlora resolve`, then dvc repro again")


def refresh(config: Config, project: Project) -> bool:
    """Writes the stages anew that follow params.yaml, where they do not; returns whether it did.

    These are the stages that prepare and read pictures, those of `study` and `compatibility`, `package`, and where an
    adapter is or was polished `distill` and `polish`. Everything else in dvc.yaml stays as it is. Where settings have
    such a section, its folder is made.

    Raises:
        UserError: dvc.yaml cannot be read, or its stages are not indented by two spaces.
    """
    path = project.dvc_yaml
    for name, text in folders(config).items():
        if not (project.root / name).parent.exists():
            atomic_write(project.root / name, partial(Path.write_text, data=text, encoding="utf-8"))
    if not path.is_file() or not _difference(config, _stages(read_yaml(path))):
        return False
    before = path.read_text(encoding="utf-8")
    wanted: dict[str, str] = _wanted(config)
    written: tuple[str, ...] = _STAGES
    if polished(config) or "polish" in _stages(read_yaml(path)):
        wanted, written = _polishing(config) | wanted, (*_POLISHING, *_STAGES)
    after = _rewritten(before, wanted, written)
    others = [_others(text, written) for text in (before, after)]
    if (difference := _difference(config, _stages(parse_yaml(after)))) or others[0] != others[1]:
        raise UserError(
            f"{path}: {difference or 'other stages would change'}; its stages cannot be rewritten, since it is not "
            "laid out as the one that comes with lcmlora (two spaces before the name of a stage)"
        )
    atomic_write(path, lambda part: part.write_text(after, encoding="utf-8"))
    return True


def folders(config: Config) -> dict[str, str]:
    """Returns the files, by path, by which Git has the folders that `package` depends on, with their texts."""
    return dict(_FOLDERS[section] for section in _FOLDERS if getattr(config, section) is not None)


def _folders(config: Config) -> dict[str, str]:
    """Returns the folder of prepared pictures of each model."""
    return {model: Project().pictures_of(model, config).as_posix() for model in config.models}


def _own_paths(config: Config) -> dict[str, str]:
    """Returns the path of the data set of each model that has one of its own."""
    return {model: config.data_for(model).path for model in config.models if config.has_own_data(model)}


def _difference(config: Config, stages: Mapping[str, object]) -> str | None:
    """Returns in words how the stages differ from what the settings ask for; None where they do not."""
    if not any(stage in stages for stage in _READING):
        return None  # a pipeline of another kind
    if ("prepare" in stages) != config.uses_shared_data():
        return f"{'has a' if 'prepare' in stages else 'lacks the'} stage prepare, and `data` is used by " + (
            "no model" if "prepare" in stages else "models"
        )
    for section in _OPTIONAL:
        if (section in stages) != (getattr(config, section) is not None):
            return f"{'has' if section in stages else 'lacks'} the stages of `{section}`, and params.yaml has " + (
                "none" if section in stages else "some"
            )
    if (listed := _listed(stages.get("prepare-own", {}), {})) != _own_paths(config):
        return f"prepare-own: has {_in_words(listed)}, and params.yaml has {_in_words(_own_paths(config))}"
    if difference := _polish_difference(config, stages):
        return difference
    shared = dict.fromkeys(config.models, Project().pictures.as_posix())
    for stage in _READING:
        listed = _listed(stages.get(stage, {}), shared)
        if stage in stages and listed != _folders(config):
            return (
                f"{stage}: reads {_in_words(listed)}, and the models of params.yaml are {_in_words(_folders(config))}"
            )
    return None


def _polish_difference(config: Config, stages: Mapping[str, object]) -> str | None:
    """Returns in words how `distill` and `polish` differ from what the settings ask for; None where they do not."""
    models = polished(config)
    if not models and "polish" not in stages:
        return None
    folders = {model: folder for model, folder in _folders(config).items() if model in models}
    if (listed := _listed(stages.get("polish", {}), {})) != folders:
        return f"polish: reads {_in_words(listed)}, and the models with distill.polish are {_in_words(folders)}"
    if (listed := _listed(stages.get("distill", {}), {})) != (_distilled(config) if models else {}):
        return f"distill: writes {_in_words(listed)}, and the models with distill.polish are {_in_words(folders)}"
    return None


def _distilled(config: Config) -> dict[str, str]:
    """Returns the folder that each model is distilled to."""
    return {model: Project().distilled(model, config).as_posix() for model in config.models}


def _polishing(config: Config) -> dict[str, str]:
    """Returns the text of `distill`, and of `polish` where an adapter is polished."""
    models = polished(config)
    if not models:
        return {
            "distill": next(block for block in _paragraphs() if _BEGIN.search(block) and _stage_of(block) == "distill")
        }
    pictures = {model: folder for model, folder in _folders(config).items() if model in models}
    text = _template("polished_adapters.yaml").replace("DISTILLED\n", _mapping(_distilled(config)))
    return _blocks(text.replace("POLISHED\n", _mapping(pictures)))


def _listed(stage: object, otherwise: dict[str, str]) -> dict[str, str]:
    """Returns the mapping of models that a stage lists; `otherwise` where it has none."""
    listed = stage.get("foreach") if isinstance(stage, dict) else None
    return {str(model): str(path) for model, path in listed.items()} if isinstance(listed, dict) else otherwise


def _in_words(paths: Mapping[str, str]) -> str:
    return shown(", ".join(f"{model}: {path}" for model, path in paths.items()), 300) or "no model"


def _wanted(config: Config) -> dict[str, str]:
    """Returns the text of each of these stages, in their order."""
    others = {_stage_of(block): block for block in _paragraphs()[1:]}
    left_out = _without(config)
    following = {name: others[name] for each in _OPTIONAL.values() for name in each if name not in left_out}
    package = others["package"]
    for section in _OPTIONAL:
        if section in left_out:
            package = package.replace(f"      - {section}\n", "")
    following["package"] = package
    shared = _blocks(_template("shared_pictures.yaml"))
    if not (own := _own_paths(config)):
        return shared | following
    text = _template("pictures_by_model.yaml").replace("OWN_DATA\n", _mapping(own))
    by_model = _blocks(text.replace("PICTURES\n", _mapping(_folders(config))))
    return ({"prepare": shared["prepare"]} if config.uses_shared_data() else {}) | by_model | following


def _without(config: Config) -> set[str]:
    """Returns the stages of the sections that the settings lack."""
    return {stage for section, each in _OPTIONAL.items() if getattr(config, section) is None for stage in each}


def _paragraphs() -> list[str]:
    """Returns the head of dvc.yaml with the first stage, and the other stages that are the same for all projects."""
    return [f"{part}\n" for part in _template("other_stages.yaml").rstrip("\n").split("\n\n")]


def _stage_of(paragraph: str) -> str:
    """Returns the name of the stage in a paragraph, which may begin with a comment."""
    found = _BEGIN.search(paragraph)
    assert found is not None, paragraph
    return paragraph[found.end() :].split(":", 1)[0].strip()


def _template(name: str) -> str:
    return resources.files("lcmlora.dvc_files").joinpath(name).read_text(encoding="utf-8")


def _mapping(values: dict[str, str]) -> str:
    """Returns the lines of a mapping within a stage's `foreach`. Its texts have quotes: to DVC, 2e3 is a number."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return "".join(f"      {line}\n" for line in lines)


def _blocks(text: str) -> dict[str, str]:
    """Returns the text of each stage, by its name."""
    return {block.split(":", 1)[0].strip(): block.rstrip("\n") + "\n" for block in _BEGIN.split(text) if block.strip()}


def _rewritten(text: str, wanted: dict[str, str], written: Sequence[str]) -> str:
    """Returns the text of dvc.yaml with these stages in the places of the former ones, or before those they precede.

    Args:
        written: the stages that are taken out.
    """
    left = dict(wanted)
    parts = []
    for block in _BEGIN.split(text):
        name = block.split(":", 1)[0].strip() if block.startswith("  ") else ""
        if name in _ORDER:
            due = [stage for stage in left if _ORDER.index(stage) <= _ORDER.index(name)]
            parts += [left.pop(stage) + "\n" for stage in due]
        parts.append(_after(block) if name in written else block)
    return "".join(parts).rstrip("\n") + "\n"


def _after(block: str) -> str:
    """Returns what follows a stage before the next one: comments that belong to that, or another section."""
    lines = block.splitlines(keepends=True)
    end = next((n for n, line in enumerate(lines) if n and line.strip() and not line.startswith("   ")), len(lines))
    return "".join(lines[end:])


def _stages(raw: object) -> dict[str, object]:
    return as_object(as_object(raw, "dvc.yaml").get("stages", {}), "dvc.yaml: stages")


def _others(text: str, written: Sequence[str]) -> dict[str, object]:
    """Returns everything in dvc.yaml but these stages."""
    raw = as_object(parse_yaml(text), "dvc.yaml")
    return raw | {"stages": {name: stage for name, stage in _stages(raw).items() if name not in written}}
