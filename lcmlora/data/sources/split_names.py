"""The splits train, validation and test in names of files and folders, read as Hugging Face's datasets reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from lcmlora.errors import UserError

TRAIN = "train"
_WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_BREAK = re.compile(r"[^a-z]+")  # the end of a word for Hugging Face: -._ and space, and numbers (val2017)
_CONTENTS = {"", "images", "image", "imgs", "img", "pictures", "photos", "data", "dataset", "set", "split", "of"}


def split_of(name: str, *, container: bool = False) -> str | None:
    """Returns the split that the outermost folder of a file names; for a container, else the one in its own name.

    A folder names a split by this word alone, or with numbers and words like `images` (`val2017`, `test_images`). A
    picture's own name counts for nothing: `test.png` may show a test. A container (a table, a tar file, a list of
    prompts) names a split by any of its words.
    """
    *folders, base = name.rstrip("/").split("/")
    for folder in folders:
        words = _BREAK.split(folder.lower())
        named = [word for word in words if word in _SPLITS]
        if named and all(word in _SPLITS or word in _CONTENTS for word in words):
            return _first(named)
    return _first([word for word in _BREAK.split(base.lower()) if word in _SPLITS]) if container else None


def _first(named: list[str]) -> str | None:
    """Returns the split of a name with these words: `train` if it is among them (train-test.tar), else the first."""
    splits = [_SPLITS[word] for word in named]
    return TRAIN if TRAIN in splits else next(iter(splits), None)


def choose(
    path: str, names: Iterable[str], wanted: Collection[str], *, container: bool = False
) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the sorted names in wanted splits, and the other names by their split.

    A name without a split is in `train`. If all names are in one split, it is used, wanted or not.

    Raises:
        UserError: there are several splits, and none of them is wanted.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(split_of(name, container=container) or TRAIN, []).append(name)
    used = used_splits(path, {split: len(names) for split, names in by_split.items()}, wanted)
    kept = sorted(name for split in used for name in by_split[split])
    return kept, {split: by_split[split] for split in sorted(by_split) if split not in used}


def used_splits(path: str, counts: Mapping[str, int], wanted: Collection[str]) -> list[str]:
    """Returns which of the splits are used, given how many names each has: the wanted ones, or the only one.

    Raises:
        UserError: there are several, and none of them is wanted.
    """
    used = [split for split in counts if split in wanted] or (list(counts) if len(counts) == 1 else [])
    if counts and not used:
        has = " and ".join(f"{count} files of {split}" for split, count in sorted(counts.items()))
        raise UserError(
            f"{path}: has {has} by their names, and none of {' or '.join(wanted)} (data.split); set data.split to "
            "what is to be trained on, or to all"
        )
    return used
