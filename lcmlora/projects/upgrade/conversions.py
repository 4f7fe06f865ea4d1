"""Settings of params.yaml that have another name or meaning since an earlier version, and what they become.

Each conversion keeps what the setting did. It changes the lines of its own keys, and leaves the rest of the file as it
is. Settings that are wrong in another way are left to `config.load`, whose errors name them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lcmlora.io.parsing import JsonObject
from lcmlora.projects.upgrade.yaml_text import YamlText
from lcmlora.settings.pretrain import Recipe

Keys = tuple[str, ...]

# Of the captions that 0.1.0 kept from training, the share of which settings are chosen by; the others are reported. It
# is that of the defaults of data.validation and data.test.
_CHOOSING = 0.36
_COARSE_FEATURES, _COARSE_PIXELS = "efficientnet-lite0", 256  # features for bases up to so many pixels


@dataclass(frozen=True)
class Converted:
    """A setting that was changed."""

    line: int  # of the file as it was
    key: str
    told: str  # what it became, and why


@dataclass(frozen=True)
class Conversion:
    """A change of settings.

    since: the release that changed them. Where the key alone does not tell an old setting from a new one, only files of
        earlier releases are converted.
    """

    since: str
    told_by_key: bool
    convert: Callable[[YamlText], Iterator[Converted]]


def convert(params: YamlText, made_by: tuple[int, ...]) -> list[Converted]:
    """Changes the settings in place, and returns what was changed.

    Args:
        made_by: the release that the project was made by, such as (0, 1, 0).

    Raises:
        UserError: a setting cannot be changed in place.
    """
    found: list[Converted] = []
    for conversion in CONVERSIONS:
        if conversion.told_by_key or made_by < tuple(map(int, conversion.since.split("."))):
            found += conversion.convert(params)
    return found


def _count_evaluations(params: YamlText) -> Iterator[Converted]:
    """evaluation.solver_steps were guided steps of a solver, and a guided step costs two network evaluations."""
    for above in _sections(params, "evaluation"):
        steps = params.get(old := (*above, "solver_steps"))
        if not params.has(old) or params.has((*above, "solver_evaluations")):
            continue
        line = params.line(old)
        if isinstance(steps, list) and all(type(step) is int for step in steps):
            params.replace(old, [2 * step for step in steps])
        params.rename(old, "solver_evaluations")
        value = params.get((*above, "solver_evaluations"))
        yield Converted(
            line, _dotted(old), f"is solver_evaluations: {value}, since a guided step costs two network evaluations"
        )


def _split_validation(params: YamlText) -> Iterator[Converted]:
    """data.validation was the share of all captions kept from training, and figures were of these."""
    for above in _sections(params, "data"):
        share = params.get(key := (*above, "validation"))
        if not isinstance(share, float | int) or isinstance(share, bool) or params.has((*above, "test")):
            continue
        line = params.line(key)
        choosing = round(_CHOOSING * share, 4)
        reported = round(share - choosing, 4)
        params.replace(key, choosing)
        params.insert_after(key, "test", reported)
        yield Converted(
            line,
            _dotted(key),
            f"{share:g} is validation: {choosing:g} and test: {reported:g}; settings are chosen by the captions of the "
            "first, and figures are of those of the second",
        )


def _drop_recipe(params: YamlText) -> Iterator[Converted]:
    """`pretrain`, the recipe of the emoji base, is a part of the package, as the base's weights are."""
    if not params.has(("pretrain",)):
        return
    line, recipe = params.line(("pretrain",)), params.get(("pretrain",))
    own = isinstance(recipe, dict) and _differs(recipe, Recipe().model_dump(mode="json"))
    params.remove(("pretrain",))
    yield Converted(
        line,
        "pretrain",
        "is removed: the recipe of the emoji base is a part of lcmlora, and no other base is pretrained"
        + ("; it differed from lcmlora's, so train such a base by 0.1.0" if own else ""),
    )


def _differs(recipe: JsonObject, own: JsonObject) -> bool:
    return any(own.get(key) != value for key, value in recipe.items())


def _drop_coarse_features(params: YamlText) -> Iterator[Converted]:
    """evaluation.features of all bases hid the features that a family of large pictures has."""
    key = ("evaluation", "features")
    if params.get(key) != _COARSE_FEATURES:
        return
    bases, models = params.get(("bases",)), params.get(("models",))
    found = [bases.get(name) for name in models] if isinstance(bases, dict) and isinstance(models, list) else []
    sizes = [base.get("resolution") for base in found if isinstance(base, dict)]
    if not any(isinstance(size, int) and size > _COARSE_PIXELS for size in sizes):
        return
    line = params.line(key)
    params.remove(key)
    yield Converted(
        line,
        _dotted(key),
        f"is removed: {_COARSE_FEATURES} is the default of small bases, and refused above {_COARSE_PIXELS} pixels, "
        "where a base has the features of its family",
    )


CONVERSIONS = (
    Conversion("0.2.0", True, _count_evaluations),
    Conversion("0.2.0", False, _split_validation),
    Conversion("0.2.0", True, _drop_recipe),
    Conversion("0.2.0", False, _drop_coarse_features),
)


def _sections(params: YamlText, section: str) -> Iterator[Keys]:
    """Yields the keys of a section and of its changes by bases, styles and fine-tunes, where there are any."""
    places: list[Keys] = [(section,)]
    for group in ("bases", "styles", "finetunes"):
        entries = params.get((group,))
        places += [(group, name, section) for name in entries] if isinstance(entries, dict) else []
    for place in places:
        if isinstance(params.get(place), dict):
            yield place


def _dotted(keys: Keys) -> str:
    return ".".join(keys)
