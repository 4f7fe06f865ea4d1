"""The settings that PEFT writes with an adapter's tensors: in the header of diffusers' files, or adapter_config.json.

PEFT takes some of them for regular expressions (`target_modules`, `exclude_modules`, the keys of `rank_pattern` and
`alpha_pattern`) and one for a module to import. A file of a few kilobytes can have an expression that never ends.
Therefore no expression from a file is run here: names are compared letter by letter. `check_harmless` refuses files
whose settings are more than names and numbers; diffusers gets only files that pass it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lcmlora.adapters import spellings
from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject, Malformed, as_object, parse_json, read_json

METADATA = "lora_adapter_metadata"  # diffusers' own key in the header
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"  # PEFT's own name; CONFIG is beside it

# Settings that make the adapter another kind than plain LoRA.
_OTHER_KINDS = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "lora_bias": "LoRA with biases"}
_LARGEST = 3.4e38  # number in fp32
_NAME = re.compile(r"\^?(?P<name>(\w|\\?[.-])+)\$?")


def alphas(path: Path, header: dict[str, str], shown: str) -> Callable[[str, int], float]:
    """Returns the function (layer, rank) -> alpha for layers whose alpha is not a tensor of the file.

    Args:
        path: the adapter's file; adapter_config.json is sought beside it.
        header: the file's metadata.
        shown: the file's name in errors.

    Raises:
        UserError: the settings are no object or those of another kind of adapter, an alpha is no number above 0, or a
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
        raise UserError(f"{place}: peft_type is {_shown(kind)}, and only LORA is supported")
    for name, other in _OTHER_KINDS.items():
        if settings.get(prefix + name):
            raise UserError(f"{place}: {name} is set, and {other} is not supported")
    pattern = f"{prefix}alpha_pattern"
    patterns = _Patterns(settings.get(pattern), f"{place}: {pattern}")
    lora_alpha = settings.get(f"{prefix}lora_alpha")
    general = None if lora_alpha is None else _number(lora_alpha, f"{place}: {prefix}lora_alpha")
    rslora = bool(settings.get(f"{prefix}use_rslora"))

    def alpha(module: str, rank: int) -> float:
        value = patterns.find(module)
        if value is None:
            value = float(rank) if general is None else general
        return value * rank**0.5 if rslora else value  # rsLoRA divides alpha by the rank's root

    return alpha


class _Patterns:
    """Numbers by layers' names, or by the ends of these names."""

    def __init__(self, patterns: object, place: str) -> None:
        # Each with its position: the first that matches counts, as in PEFT.
        self._whole: dict[str, tuple[int, float]] = {}
        self._endings: dict[str, tuple[int, float]] = {}
        for position, (key, value) in enumerate(as_object({} if patterns is None else patterns, place).items()):
            name, whole = _literal(key, place)
            number = _number(value, f"{place}: {spellings.shown(key)}")
            (self._whole if whole else self._endings).setdefault(name, (position, number))

    def find(self, module: str) -> float | None:
        parts = module.split(".")
        endings = [self._endings.get(".".join(parts[i:])) for i in range(len(parts))]
        matching = [each for each in (self._whole.get(module), *endings) if each is not None]
        return min(matching)[1] if matching else None


def _literal(key: str, place: str) -> tuple[str, bool]:
    """Returns the name in a pattern, and whether it is a layer's whole name. Raises UserError for an expression."""
    match = _NAME.fullmatch(key) if len(key) <= 300 else None
    if match is None:
        raise UserError(
            f"{place}: {spellings.shown(key)} is a regular expression, and those of files are not run; "
            "expected the layers' names, or how they end"
        )
    return match["name"].replace("\\", ""), key.startswith("^")


def check_harmless(header: dict[str, str], names: list[str], shown: str) -> None:
    """Raises UserError if diffusers and PEFT might run a regular expression from the file.

    Args:
        header: the metadata of a safetensors file.
        names: the names of its tensors, from which diffusers makes patterns.
        shown: the file's name in errors.
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
                f"{place}: {spellings.shown(key)} is {_shown(value)}, which PEFT might run; not given to diffusers: "
                "write the file anew with lcmlora convert"
            )


def _parsed(text: str, place: str) -> JsonObject:
    try:
        return as_object(parse_json(text), place)
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None


def _number(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: expected a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = _LARGEST
    if not 0 < number < _LARGEST:
        raise UserError(f"{place}: expected a number above 0, got {_shown(value)}")
    return number


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
