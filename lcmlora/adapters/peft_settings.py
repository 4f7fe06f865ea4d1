"""The settings that PEFT writes beside an adapter's tensors: in the header of diffusers' files, or adapter_config.json.

PEFT takes some of them for regular expressions (`target_modules`, `exclude_modules`, the keys of `rank_pattern` and
`alpha_pattern`) and one for a module to import. A file of a few kilobytes can hold an expression that never ends, so
nothing out of a file is run here: names are compared letter by letter, and `check_harmless` lets no file come to
diffusers whose settings are more than names and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcmlora.adapters import spellings
from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, as_object, parse_json, read_json

METADATA = "lora_adapter_metadata"  # diffusers' own key in the header
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"  # PEFT's own name, beside which CONFIG lies

# The setting makes the adapter another kind than plain LoRA.
_OTHER_KINDS = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "lora_bias": "LoRA with biases"}
_LARGEST = 3.4e38  # what fp32 holds
_NAME = re.compile(r"\^?(?P<name>(\w|\\?[.-])+)\$?")


def alphas(path: Path, header: dict[str, str], shown: str) -> Callable[[str, int], float]:
    """Returns alpha by layer and rank for tensors without one.

    Raises:
        UserError: settings that are none, of another kind of adapter, or with an alpha that is no number or whose
            layer is named by a regular expression.
    """
    beside = path.with_name(CONFIG)
    if METADATA in header:
        place, prefix = f"{shown}: {METADATA}", "unet."
        settings = _parsed(header[METADATA], place)
    elif path.name == WEIGHTS and beside.is_file():
        place, prefix = str(beside), ""
        settings = as_object(read_json(beside), place)
    elif path.name == WEIGHTS:
        raise UserError(f"{beside}: no such file; it has the alpha of {shown}, without which its strength is unknown")
    else:
        return lambda module, rank: float(rank)
    kind = settings.get(f"{prefix}peft_type")
    if kind is not None and kind != "LORA":
        raise UserError(f"{place}: peft_type is {_told(kind)}, and only LORA is supported")
    for name, other in _OTHER_KINDS.items():
        if settings.get(prefix + name):
            raise UserError(f"{place}: {name} is set, and {other} is not supported")
    pattern = f"{prefix}alpha_pattern"
    patterns = _Patterns(settings.get(pattern), f"{place}: {pattern}")
    general = settings.get(f"{prefix}lora_alpha")
    if general is not None:
        general = _number(general, f"{place}: {prefix}lora_alpha")
    rslora = bool(settings.get(f"{prefix}use_rslora"))

    def alpha(module: str, rank: int) -> float:
        own = patterns.find(module)
        found: float = (float(rank) if general is None else general) if own is None else own
        return found * rank**0.5 if rslora else found  # rsLoRA divides by the rank's root

    return alpha


class _Patterns:
    """Numbers by layers' names, or by how these end."""

    def __init__(self, patterns: Any, place: str) -> None:
        self._whole: dict[str, tuple[int, float]] = {}  # each with its place: the first that fits counts, as in PEFT
        self._endings: dict[str, tuple[int, float]] = {}
        for place_of, (key, value) in enumerate(as_object({} if patterns is None else patterns, place).items()):
            name, whole = _literal(key, place)
            number = _number(value, f"{place}: {spellings.shown(key)}")
            (self._whole if whole else self._endings).setdefault(name, (place_of, number))

    def find(self, module: str) -> float | None:
        parts = module.split(".")
        fitting = [self._endings.get(".".join(parts[i:])) for i in range(len(parts))]
        found = [each for each in (self._whole.get(module), *fitting) if each is not None]
        return min(found)[1] if found else None


def _literal(key: str, place: str) -> tuple[str, bool]:
    """Returns the name that a pattern is, and whether it is a layer's whole name."""
    match = _NAME.fullmatch(key) if len(key) <= 300 else None
    if match is None:
        raise UserError(
            f"{place}: {spellings.shown(key)} is a regular expression, and those of files are not run; "
            "expected the layers' names, or how they end"
        )
    return match["name"].replace("\\", ""), key.startswith("^")


def check_harmless(header: dict[str, str], names: list[str], shown: str) -> None:
    """Raises UserError where diffusers and PEFT, given the file, might run a regular expression of its maker's.

    Args:
        header: of a safetensors file.
        names: of its tensors, of which diffusers makes patterns.
    """
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,300}", name):
            raise UserError(f"{shown}: {spellings.shown(name)} is no name of a layer's tensor; not given to diffusers")
    if METADATA not in header:
        return
    place = f"{shown}: {METADATA}"
    for key, value in _parsed(header[METADATA], place).items():
        setting = key.rpartition(".")[2]
        if setting == "target_modules":
            harmless = isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(r"[\w.]+", v) for v in value)
        elif setting in ("rank_pattern", "alpha_pattern"):
            for pattern, number in as_object({} if value is None else value, f"{place}: {key}").items():
                _literal(pattern, f"{place}: {key}")
                _number(number, f"{place}: {key}: {spellings.shown(pattern)}")
            harmless = True
        elif setting in ("r", "lora_alpha"):
            harmless = _number(value, f"{place}: {key}") > 0
        else:
            harmless = value in (None, False, "", "none", "LORA") or value in ({}, [])
            harmless = harmless or (setting in ("use_rslora", "init_lora_weights", "inference_mode") and value is True)
        if not harmless:
            raise UserError(
                f"{place}: {spellings.shown(key)} is {_told(value)}, which PEFT might run; not given to diffusers: "
                "write the file anew with lcmlora convert"
            )


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        return as_object(parse_json(text), place)
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: expected a number, got {_told(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = _LARGEST
    if not 0 < number < _LARGEST:
        raise UserError(f"{place}: expected a number above 0, got {_told(value)}")
    return number


def _told(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
