"""Parts of a data set that its files' and folders' names call train, validation or test, as Hugging Face reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from lcmlora.errors import UserError

TRAIN = "train"
_WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_BREAK = re.compile(r"[^a-z]+")  # what HF takes for the end of a word: -._ and space, and numbers (val2017)
_CONTENTS = {"", "images", "image", "imgs", "img", "pictures", "photos", "data", "dataset", "set", "split", "of"}


def of(name: str, *, container: bool = False) -> str | None:
    """Returns the split of a file: of the outermost folder that names one, or by its own name where it is a container.

    A folder names one by this word alone, or with numbers and words like `images` (`val2017`, `test_images`). Pictures
    do not: `test.png` may show a test. A container (a table, a tar file, a list of prompts) does by any of its words.
    """
    path = PurePosixPath(name)
    for folder in path.parts[:-1]:
        words = _BREAK.split(folder.lower())
        named = [word for word in words if word in _SPLITS]
        if named and all(word in _SPLITS or word in _CONTENTS for word in words):
            return _first(named)
    return _first([word for word in _BREAK.split(path.name.lower()) if word in _SPLITS]) if container else None


def _first(named: list[str]) -> str | None:
    """A name with several words of this kind, like train-test.tar, is of `train` where that is one of them."""
    splits = [_SPLITS[word] for word in named]
    return TRAIN if TRAIN in splits else next(iter(splits), None)


def choose(
    path: str, names: Iterable[str], wanted: Collection[str], *, container: bool = False
) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the names that are of a wanted split, and the others by their split.

    What is of no split counts as `train`. Where all is of one split, that is taken: there is nothing to tell it from.

    Raises:
        UserError: there are several splits, and none of them is wanted.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(of(name, container=container) or TRAIN, []).append(name)
    taken = [split for split in found if split in wanted] or (list(found) if len(found) == 1 else [])
    if found and not taken:
        counts = " and ".join(f"{len(names)} files of {split}" for split, names in sorted(found.items()))
        raise UserError(
            f"{path}: has {counts} by their names, and none of {' or '.join(wanted)} (data.split); set data.split to "
            "what is to be trained on, or to all"
        )
    kept = sorted(name for split in taken for name in found[split])
    return kept, {split: found[split] for split in sorted(found) if split not in taken}
