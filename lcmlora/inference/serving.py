"""Writing the MLflow model of a release: code, signature and requirements, for any server that runs MLflow models.

It has two flavours: our pyfunc, which servers run, and MLflow's own for LoRA adapters, `mlflow.diffusers`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import lcmlora
from lcmlora.adapters.metadata import USUAL_STEPS, WEIGHTS
from lcmlora.io.files import temporary_folder
from lcmlora.releases import bundle

SCRIPT = "pyfunc_model.py"
RELEASE = "artifacts/release"  # the release's place in the model's folder
# Parameters of a request. Width and height 0 are the release's resolution: MLflow has no parameter without a default.
DEFAULTS: dict[str, int | float] = {"steps": USUAL_STEPS, "guidance": 1.0, "seed": 0, "width": 0, "height": 0}
# Wings of this package that no drawing needs: those that may not be imported by `inference`, and stages before it.
LEFT_OUT = ("registry", "demo", "projects", "cli", "tasks", "flows", "doctor", "distillation", "training")
REQUIREMENTS = (
    "accelerate",
    "diffusers",
    "mlflow",
    "numpy",
    "peft",
    "pillow",
    "prometheus-client",
    "pydantic",
    "pyyaml",
    "safetensors",
    "torch",
    "transformers",
)


def write_model(folder: Path, *, model: str, base: Mapping[str, str | None], steps: int | None = None) -> None:
    """Writes an MLflow model to `folder`. It can draw as soon as a release's files are in its RELEASE.

    It consists of a script (pyfunc_model.py) and a copy of this package, of what drawing needs. It has no pickle, so
    that whoever loads it runs this code and no other.

    Args:
        folder: new or empty.
        model: a name under `bases` in params.yaml, for the metadata.
        base: `base` of the release's provenance.
        steps: of a request that does not say its own, `recommended_steps` of the provenance.
    """
    import mlflow.pyfunc
    import pandas  # type: ignore[import-untyped]

    package = Path(lcmlora.__file__).parent
    defaults = DEFAULTS | ({"steps": steps} if steps else {})
    with temporary_folder() as staging, _quiet():
        code = Path(staging, package.name)
        shutil.copytree(package, code, ignore=_not_code)
        mlflow.pyfunc.save_model(
            folder,
            python_model=Path(__file__).with_name(SCRIPT),
            signature=_signature(defaults),
            input_example=(pandas.DataFrame({"prompt": ["owl"]}), defaults),  # MLflow shows it, and draws nothing
            pip_requirements=_requirements(),
            code_paths=[str(code)],
            metadata={"model": model},
        )
    _complete(folder / "MLmodel", base)


def write_model_of(release: Path, folder: Path) -> None:
    """Writes an MLflow model to `folder` that draws with a release; of its files it has those that drawing needs.

    Args:
        folder: new or empty.

    Raises:
        UserError: the release's provenance cannot be read.
    """
    provenance = bundle.Provenance.read(release / bundle.PROVENANCE)
    write_model(folder, model=provenance.model, base=provenance.base, steps=provenance.recommended_steps)
    (folder / RELEASE).mkdir(parents=True)
    for name in bundle.DRAWING_FILES:
        shutil.copyfile(release / name, folder / RELEASE / name)  # MLflow follows no link out of the folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MLflow from printing every step to standard error."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _not_code(folder: str, names: list[str]) -> set[str]:
    def is_code(path: Path) -> bool:
        if path.is_dir():
            top = path.parent == Path(lcmlora.__file__).parent  # links among them are followed
            return path.name != "__pycache__" and not (top and path.name in (*LEFT_OUT, "templates"))
        return path.suffix in (".py", ".json", ".j2") or path.name == "py.typed"

    return {name for name in names if not is_code(Path(folder, name))}


def _signature(defaults: Mapping[str, int | float]) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("binary", "png")]),
        params=ParamSchema(
            [ParamSpec(name, "double" if name == "guidance" else "long", value) for name, value in defaults.items()]
        ),
    )


def _requirements() -> list[str]:
    # A local label, such as torch's +cpu, names a build that PyPI does not have.
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _complete(path: Path, base: Mapping[str, str | None]) -> None:
    """Adds to MLmodel what MLflow writes only for files that it copies itself: the artifacts, and its LoRA flavour."""
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    del described["model_size_bytes"]  # without the release
    flavor = described["flavors"]["python_function"]
    flavor["artifacts"] = {"release": {"path": RELEASE, "uri": RELEASE}}
    flavor["model_code_path"] = SCRIPT  # MLflow writes this machine's path, and reads only its last part
    if (lora := lora_flavor(base)) is not None:
        described["flavors"]["diffusers"] = lora
    path.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")


def lora_flavor(base: Mapping[str, str | None]) -> dict[str, str] | None:
    """Returns the entry with which `mlflow.diffusers.load_model` loads the release as an adapter of its base.

    MLflow knows no base to which a style was added, and would draw with another one: such a release has no entry.
    """
    source, revision = base.get("source"), base.get("revision")
    if not source or base.get("style"):
        return None
    pinned = {"base_model_revision": revision} if revision else {}
    return {
        "base_model": source,
        **pinned,
        "adapter_type": "lora",
        "adapter_weights": RELEASE,
        "weight_name": WEIGHTS,  # the release has a second file with the same adapter
        "diffusers_version": metadata.version("diffusers"),
    }
