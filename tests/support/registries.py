"""Empty MLflow databases: the first one takes ten seconds to make, the others are copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lcmlora.config import Registry
from lcmlora.registry.tracking import log_run

_TEMPLATE = "mlflow-template"


def fresh(folder: Path, factory: pytest.TempPathFactory) -> Registry:
    """Returns a registry with an empty sqlite database in `folder`; artifacts go to mlruns in the current folder."""
    template = factory.getbasetemp() / _TEMPLATE / "mlflow.db"
    if not template.exists():
        template.parent.mkdir()
        settings = Registry(tracking_uri=f"sqlite:///{template}", experiment="template", alias="champion")
        with log_run(settings, "template", {}) as run:
            assert run.id
    shutil.copyfile(template, folder / "mlflow.db")
    return Registry(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", experiment="lcmlora", alias="champion")
