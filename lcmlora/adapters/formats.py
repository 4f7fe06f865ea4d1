"""Adapters' files, read and written: diffusers' and PEFT's, and those of kohya's trainer (for ComfyUI and A1111).

The output of an adapted layer is W x + (alpha / rank) B A x.

* A diffusers file has alpha folded into B, so that its scale is 1; its header says so.
* A kohya file has one rank and one alpha for all layers, and its B is not folded. alpha is the adapter's own, or the
  one that it was trained with, if dividing B by alpha / rank and multiplying again gives back every bit (for powers of
  two it does); else the rank. Layers of smaller rank are padded with zeros: if a file has several alphas, diffusers
  0.42 gives all attention layers the most frequent one.

Both files have the same effect to the last bit. Every written file is read again and compared layer by layer.

Headers follow the model spec 1.0.1 (Stability-AI/ModelSpec), which programs with a page for each adapter show: title,
description, author, license, usage hint, thumbnail. They have no date, so that the same adapter gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lcmlora.adapters import factors, layer_names, lora, peft_settings, spellings, tensorfile
from lcmlora.adapters.factors import Part, Spelled
from lcmlora.adapters.layer_names import Architecture
from lcmlora.adapters.spellings import ALPHA, DOWN, UP
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write

DIFFUSERS, KOHYA = "diffusers", "kohya"

_PREDICTS = {"epsilon": "epsilon", "v_prediction": "v"}

_TITLE, _PREDICTION, _ARCHITECTURE, _IMPLEMENTATION = (
    f"modelspec.{key}" for key in ("title", "prediction_type", "architecture", "implementation")
)
_ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
# Keys of a header that a conversion keeps: the model spec's, and lcmlora's own.
_KEPT = ("modelspec.", "lcmlora.")

_MAX_PADDED = 2 << 30  # bytes of an adapter after its layers are padded to one rank

# The largest error of a layer's effective weight by rounding in the file's type, as a share of the largest weight.
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Layer:
    """An adapter's factors for one layer."""

    down: Tensor  # A, (r, in) or (r, in, kh, kw)
    up: Tensor  # B, (out, r) or (out, r, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def folded(self) -> Layer:
        """The same layer at scale 1, as a diffusers file has it; B is in fp32 if it was scaled."""
        if self.scale == 1:
            return self
        return Layer(self.down, self.up.float() * self.scale, float(self.rank))

    @property
    def delta(self) -> Tensor:
        """The term that is added to the layer's weight, (out, in * kh * kw) fp32."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True)
class Adapter:
    """An adapter of a UNet in memory."""

    source: str  # the file, for errors
    layers: dict[str, Layer]  # by diffusers' name of the module, sorted
    dtype: torch.dtype  # of the weights in a file
    left_out: int = 0  # number of tensors of text encoders and trained tokens that were not read
    header: Mapping[str, str] = field(default_factory=dict)  # what the file's says of the adapter, see `_KEPT`

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())


def read(path: Path, base: Architecture | None = None, *, unet_only: bool = False) -> Adapter:
    """Returns the adapter in a file of any spelling; see `spellings`.

    alpha is the file's, else that of the configuration in its header (diffusers) or in the adapter_config.json beside
    it (PEFT), else the rank.

    Args:
        base: the base's architecture. Without it, layers with diffusers' names need none; layers with other names are
            looked up in the published architectures.
        unet_only: leave tensors of text encoders and trained tokens out. Otherwise they are refused, since without
            them a style that was trained on both is another style.

    Raises:
        UserError: the file is a pickle, unreadable, or no plain LoRA of a UNet; a tensor is missing, superfluous or not
            finite; or the adapter was made for another base. The error names the first such tensor.
    """
    return _read(path, base, unet_only, str(path))


def _read(path: Path, base: Architecture | None, unet_only: bool, shown: str) -> Adapter:
    tensors, header = tensorfile.read(path, shown)
    factors.check_model(tensors, spellings.foreign_model(base.shapes) if base else None, shown)
    others = factors.check_others(tensors, unet_only, shown)
    spelled = factors.by_layer({name: tensor for name, tensor in tensors.items() if name not in others}, shown)
    factors.check_factors(spelled, shown)
    kept = {key: text for key, text in header.items() if key.startswith(_KEPT)}
    if "ss_output_name" in header:
        kept.setdefault(_TITLE, header["ss_output_name"])
    if base is None and not all(spellings.Name(layer, DOWN).is_diffusers for layer in spelled):
        base = _recognise(spelled, shown, kept)
    alpha = peft_settings.alphas(path, header, shown)
    layers: dict[str, Layer] = {}
    for name, parts in spelled.items():
        module = name if base is None else _module(name, parts, base, shown)
        if module in layers:
            raise UserError(f"{shown}: the layer {module} is there twice, under several spellings")
        down, up = parts[DOWN].tensor, parts[UP].tensor
        value = factors.alpha_of(parts[ALPHA], shown) if ALPHA in parts else alpha(module, down.shape[0])
        layers[module] = Layer(down, up, value)
    return Adapter(shown, dict(sorted(layers.items())), _dtype(layers), len(others), kept)


def _dtype(layers: dict[str, Layer]) -> torch.dtype:
    dtypes = {tensor.dtype for layer in layers.values() for tensor in (layer.down, layer.up)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _module(name: str, parts: dict[str, Part], base: Architecture, shown: str) -> str:
    """Returns diffusers' name of the layer. Raises UserError if the base lacks the layer, or has it in another size."""
    name = name.removeprefix(f"{base.prefix}.")
    module = name if name in base.shapes else base.spellings.get(name.replace(".", "_"))
    if module is None:
        raise UserError(f"{shown}: holds {name}, which this base does not have: it was made for another base")
    down, up = tuple(parts[DOWN].tensor.shape), tuple(parts[UP].tensor.shape)
    rank, (outputs, *inputs) = down[0], base.shapes[module]
    expected = (rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:]))
    if (down, up) != expected:
        raise UserError(
            f"{shown}: {module} is {down} and {up}, and this base takes {expected[0]} and {expected[1]}: it was made "
            "for another base"
        )
    return module


def _recognise(spelled: Spelled, shown: str, header: Mapping[str, str]) -> Architecture:
    """Returns the published architecture that has all of these layers, by name and size.

    SDXL has all layers of SSD-1B, by the same names. Of several architectures it is the one that the file's header
    names, else the one all of whose layers of the adapter's kinds the adapter has, else the first.
    """
    fitting = [base for base in layer_names.published().values() if _fits(base, spelled, shown)]
    if not fitting:
        raise UserError(
            f"{shown}: its layers are those of none of {', '.join(layer_names.published())}; name the base that it was "
            "made for (--base, a name in params.yaml or a diffusers folder)"
        )
    named = [base for base in fitting if header.get(_ARCHITECTURE, "").startswith(f"{base.naming.architecture}/")]
    return [*named, *(base for base in fitting if _has_all(base, spelled, shown)), *fitting][0]


def _fits(base: Architecture, spelled: Spelled, shown: str) -> bool:
    try:
        for name, parts in spelled.items():
            _module(name, parts, base, shown)
    except UserError:
        return False
    return True


def _has_all(base: Architecture, spelled: Spelled, shown: str) -> bool:
    """Whether an adapter that fits the base has all of its layers of the same kinds, such as attn1.to_q."""

    def kind(layer: str) -> str:
        return re.sub(r"\.\d+(?=\.)", "", layer)

    layers = {_module(name, parts, base, shown) for name, parts in spelled.items()}
    kinds = set(map(kind, layers))
    return layers == {layer for layer in base.shapes if kind(layer) in kinds}


def write(
    adapter: Adapter,
    path: Path,
    spelling: str,
    base: Architecture | None = None,
    *,
    header: Mapping[str, str] | None = None,
    alpha: float | None = None,
) -> float:
    """Writes the adapter, reads the file again, and returns the largest difference of an effective weight.

    The difference is a share of the layer's largest weight, and 0 unless alpha was folded with rounding. The same
    adapter gives the same bytes. A file that differs by more than rounding is removed.

    Args:
        spelling: DIFFUSERS or KOHYA.
        base: the base's architecture; without it, a kohya file's is looked up in the published architectures.
        header: keys for the file's header, before those that the adapter's own file has. The title is the file's name
            by default. What the tensors and the base say is added.
        alpha: of a kohya file, if it can be exact, see the module; by default the adapter's own.

    Raises:
        UserError: a tensor is missing or superfluous, or a weight differs by more than rounding.
    """
    given = {_TITLE: path.stem, **adapter.header, **(header or {})}
    if spelling == KOHYA:
        structure = base or _recognise(_spelled(adapter.layers), adapter.source, adapter.header)
        tensors, kept = _kohya(adapter, structure, alpha)
        metadata = _kohya_header(adapter, structure, given, kept) | _model_spec(tensors, adapter, structure, given)
    else:
        tensors, metadata = _diffusers(adapter, base.prefix if base else "unet")
        if base and (header or adapter.header):
            metadata |= _model_spec(tensors, adapter, base, given) | {_IMPLEMENTATION: "diffusers"}
    _check_range(tensors, adapter)
    error = 0.0

    def write_and_verify(temporary: Path) -> None:
        nonlocal error
        lora.save_file(tensors, temporary, dtype=adapter.dtype, metadata=metadata)
        error = verify(temporary, adapter, tensors, base, shown=str(path))

    atomic_write(path, write_and_verify)
    return error


def _check_range(tensors: dict[str, Tensor], adapter: Adapter) -> None:
    """Raises UserError if a tensor has a value that is too large for the file's type."""
    for name, tensor in tensors.items():
        largest = tensor.abs().max().item()
        if not largest <= torch.finfo(adapter.dtype).max and not name.endswith(f".{ALPHA}"):
            raise UserError(
                f"{adapter.source}: {name} is too large for {adapter.dtype}, its largest value is {largest:.2g}; "
                "write it in fp32 (--precision fp32), or its alpha is wrong"
            )


def verify(
    path: Path, adapter: Adapter, names: Iterable[str], base: Architecture | None = None, *, shown: str | None = None
) -> float:
    """Reads a file that was written for `adapter` and returns the largest difference, see `write`.

    Args:
        names: of the tensors that the file must have.

    Raises:
        UserError: a tensor or a layer is missing or superfluous, or a weight differs by more than rounding.
    """
    shown = shown or str(path)
    with safe_open(path, framework="pt") as file:
        stored, expected = set(file.keys()), set(names)
    if stored != expected:
        missing, extra = sorted(expected - stored), sorted(stored - expected)
        lost = f"{len(missing)} tensors were lost, the first is {missing[0]}" if missing else ""
        added = f"{len(extra)} tensors are superfluous, the first is {extra[0]}" if extra else ""
        raise UserError(f"{shown}: {'; '.join(filter(None, (lost, added)))}")
    return compare(adapter, _read(path, base, False, shown))


def compare(expected: Adapter, written: Adapter) -> float:
    """Returns the largest difference of an effective weight, as a share of the layer's largest.

    Raises:
        UserError: a layer is only in one of the adapters, or differs by more than rounding; the error names it.
    """
    for name in expected.layers.keys() ^ written.layers.keys():
        raise UserError(f"{written.source}: {name} {'was lost' if name in expected.layers else 'is superfluous'}")
    worst = 0.0
    for name, layer in expected.layers.items():
        rank = max(layer.rank, written.layers[name].rank)
        one, other = padded(layer.folded, rank), padded(written.layers[name].folded, rank)
        if torch.equal(one.down.float(), other.down.float()) and torch.equal(one.up.float(), other.up.float()):
            continue
        delta = layer.delta
        size = delta.abs().max().item()
        difference = (written.layers[name].delta - delta).abs().max().item() / (size or 1)
        if not difference <= _TOLERANCE[written.dtype]:
            raise UserError(
                f"{written.source}: the effective weight of {name} differs by {difference:.1e} of its largest, "
                f"expected at most {_TOLERANCE[written.dtype]:g} in {written.dtype}; write it in fp32"
            )
        worst = max(worst, difference)
    return worst


def _diffusers(adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}.{name}.lora_B.weight"] = layer.folded.up
    others = {f"^{name}": layer.rank for name, layer in adapter.layers.items() if layer.rank != adapter.rank}
    settings = {
        f"{prefix}.peft_type": "LORA",
        f"{prefix}.r": adapter.rank,
        f"{prefix}.lora_alpha": adapter.rank,
        f"{prefix}.target_modules": list(adapter.layers),
    }
    if others:
        settings |= {f"{prefix}.rank_pattern": others, f"{prefix}.alpha_pattern": others}
    return tensors, {"format": "pt", peft_settings.METADATA: json.dumps(settings, sort_keys=True)}


def _kohya(adapter: Adapter, base: Architecture, alpha: float | None) -> tuple[dict[str, Tensor], float]:
    """Returns the tensors of a kohya file and its alpha."""
    for name, parts in _spelled(adapter.layers).items():
        _module(name, parts, base, adapter.source)
    numbers_per_rank = {name: layer.down[0].numel() + len(layer.up) for name, layer in adapter.layers.items()}
    padded_size = sum(numbers_per_rank.values()) * adapter.rank * adapter.dtype.itemsize
    size = sum(numbers_per_rank[name] * layer.rank for name, layer in adapter.layers.items()) * adapter.dtype.itemsize
    if padded_size > max(_MAX_PADDED, 2 * size):
        raise UserError(
            f"{adapter.source}: its largest rank is {adapter.rank}, and in kohya's format, where all layers have one "
            f"rank, its {size / 1e9:.1f} GB would become {padded_size / 1e9:.1f} GB; make it smaller (lcmlora combine "
            "--rank)"
        )
    layers = {name: padded(layer, adapter.rank) for name, layer in adapter.layers.items()}
    own = {layer.alpha for layer in layers.values()}
    if len(own) == 1 and alpha in (None, *own):
        stored, ups = float(own.pop()), {name: layer.up for name, layer in layers.items()}
    else:
        stored, ups = _rescaled(layers, float(adapter.rank if alpha is None else alpha), adapter)
    tensors = {}
    for name, layer in layers.items():
        stem = f"lora_unet_{base.kohya[name]}"
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = ups[name]
        tensors[f"{stem}.alpha"] = torch.tensor(stored)
    return tensors, stored


def _rescaled(layers: dict[str, Layer], alpha: float, adapter: Adapter) -> tuple[float, dict[str, Tensor]]:
    """Returns this alpha and the B of all layers for it, in the file's type; or the rank as alpha, if those round."""
    scale = alpha / adapter.rank
    ups, exact = {}, True
    for name, layer in layers.items():
        folded = layer.folded.up.to(adapter.dtype).float()
        ups[name] = (folded / scale).to(adapter.dtype)
        exact = exact and torch.equal(ups[name].float() * scale, folded)
    return (alpha, ups) if exact or scale == 1 else _rescaled(layers, float(adapter.rank), adapter)


def padded(layer: Layer, rank: int) -> Layer:
    """Returns the layer padded with zeros to this rank, at the same scale; its effect is the same."""
    padding = rank - layer.rank
    if padding == 0:
        return layer
    down = torch.cat([layer.down, layer.down.new_zeros(padding, *layer.down.shape[1:])])
    up = torch.cat([layer.up, layer.up.new_zeros(layer.up.shape[0], padding, *layer.up.shape[2:])], dim=1)
    return Layer(down, up, layer.scale * rank)


def _model_spec(
    tensors: Mapping[str, Tensor], adapter: Adapter, base: Architecture, given: Mapping[str, str]
) -> dict[str, str]:
    """Returns the given keys, completed by what the tensors and the base say in the words of the model spec."""
    data = save({n: t if n.endswith(".alpha") else t.to(adapter.dtype).contiguous() for n, t in tensors.items()})
    content = data[8 + int.from_bytes(data[:8], "little") :]
    header = {
        **given,
        "modelspec.sai_model_spec": "1.0.1",
        _ARCHITECTURE: f"{_version_and_architecture(base, given)[1]}/lora",
        # The code whose names the tensors have.
        _IMPLEMENTATION: _ORIGINAL_CODE if base.naming.original else "diffusers",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(content).hexdigest()}",
    }
    if base.resolution:
        header["modelspec.resolution"] = f"{base.resolution}x{base.resolution}"
    if predicts := _predicts(base, given):
        header[_PREDICTION] = predicts
    return header


def _kohya_header(adapter: Adapter, base: Architecture, given: Mapping[str, str], alpha: float) -> dict[str, str]:
    """Returns the keys of kohya's trainer, by which programs tell an adapter's base and rank."""
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": _version_and_architecture(base, given)[0],
        "ss_v2": str(base.naming.v2),
        "ss_output_name": given[_TITLE],
    }
    if any(layer.down.ndim == 4 and layer.down.shape[-1] > 1 for layer in adapter.layers.values()):
        # kohya has a separate rank for convolutions.
        header["ss_network_args"] = json.dumps({"conv_dim": str(adapter.rank), "conv_alpha": str(alpha)})
    return header


def _predicts(base: Architecture, given: Mapping[str, str]) -> str | None:
    """Returns the prediction type in the model spec's words: the base's, if that is known, else the given one."""
    return _PREDICTS.get(base.prediction_type or "") or given.get(_PREDICTION)


def _version_and_architecture(base: Architecture, given: Mapping[str, str]) -> tuple[str, str]:
    naming = base.naming
    if naming.predicting_v and _predicts(base, given) == "v":
        return naming.predicting_v
    return naming.version, naming.architecture


def _spelled(layers: dict[str, Layer]) -> Spelled:
    return {name: {DOWN: Part(name, layer.down), UP: Part(name, layer.up)} for name, layer in layers.items()}


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    layers: int
    tensors: int
    rank: int  # the largest of a layer
    alpha: tuple[float, ...]  # the different values of the layers that were read
    left_out: int  # number of tensors of text encoders and trained tokens that were not read
    error: float  # the largest difference of an effective weight, as a share of its layer's largest


def convert(
    source: Path,
    out: Path,
    spelling: str,
    base: Architecture | None = None,
    *,
    unet_only: bool = False,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Writes the adapter in `source` to `out` in another spelling.

    The header keeps what the source's says by the model spec, such as title and prediction type, and is completed by
    what the layers and the base say.

    Args:
        dtype: of the weights in `out`; the source's by default.
        spelling, base, unet_only: see `read` and `write`.

    Raises:
        UserError: see `read` and `write`.
    """
    adapter = read(source, base, unet_only=unet_only)
    if base is None:
        base = _recognise(_spelled(adapter.layers), str(source), adapter.header)
    adapter = replace(adapter, dtype=dtype or adapter.dtype)
    error = write(adapter, out, spelling, base)
    return Conversion(
        layers=len(adapter.layers),
        tensors=(3 if spelling == KOHYA else 2) * len(adapter.layers),
        rank=adapter.rank,
        alpha=tuple(sorted({layer.alpha for layer in adapter.layers.values()})),
        left_out=adapter.left_out,
        error=error,
    )
