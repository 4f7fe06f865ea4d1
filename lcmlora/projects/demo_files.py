"""The files of the demo, the emoji base: its settings, its weights, and the results that take longest.

They come with the package, below lcmlora/demo/emoji, 31 MB in all; in lcmlora's own repository these are links to the
files of the repository. The artwork does not: it is other people's, and comes from npm by the digests of
package-lock.json.
"""

from __future__ import annotations

import re
import shutil
from functools import partial
from importlib import resources
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write

_TEXTS = {
    "params.yaml": "params.yaml",
    "package.json": "package.json",
    "package-lock.json": "package-lock.json",
    ".npmrc": "npmrc",
    "dvc.lock": "dvc.lock",
}
WEIGHTS = (Path("bases", "emoji"), Path("loras"))  # the base, and the LoRA of a style that params.yaml names
_CACHE = Path(".dvc", "cache", "files")
_PRETRAIN = re.compile(r"^  pretrain:\n.*?(?=^  \S)", re.MULTILINE | re.DOTALL)


def texts() -> dict[str, str]:
    """Returns the text files of the demo, by their path in the project, with params.yaml.

    Raises:
        UserError: this installation does not have them.
    """
    root = resources.files("lcmlora.demo").joinpath("emoji")
    if not root.joinpath("params.yaml").is_file():
        raise UserError("--base emoji: this installation of lcmlora has no files of the demo; a wheel of it has them")
    found = {path: root.joinpath(name).read_text(encoding="utf-8") for path, name in _TEXTS.items()}
    # The stage that makes the base is lcmlora's own repository's.
    return found | {"dvc.lock": _PRETRAIN.sub("", found["dvc.lock"])}


def weights_in_the_way(root: Path) -> list[str]:
    """Returns the files in the project's folder, by path, that stand where others of the base belong."""
    pairs = [pair for folder in WEIGHTS for pair in _pairs(folder.as_posix(), root / folder)]
    return sorted(
        target.relative_to(root).as_posix()
        for source, target in pairs
        if target.exists() and not (target.is_file() and target.read_bytes() == source.read_bytes())
    )


def copy_weights(root: Path) -> None:
    """Copies the base and the LoRA into the project in this folder."""
    for folder in WEIGHTS:
        _copy(folder.as_posix(), root / folder)


def copy_cache(root: Path) -> None:
    """Copies the reference, which takes 25 minutes to draw, into DVC's cache of the project in this folder."""
    _copy("cache", root / _CACHE)


def _copy(name: str, folder: Path) -> None:
    """Copies the files below `name` that are not there."""
    for source, target in _pairs(name, folder):
        if not target.exists():
            atomic_write(target, partial(shutil.copyfile, source))


def _pairs(name: str, folder: Path) -> list[tuple[Path, Path]]:
    """Returns the files below `name` in the package, each with its place below the folder."""
    root = Path(str(resources.files("lcmlora.demo").joinpath("emoji", name)))
    return [(path, folder / path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
