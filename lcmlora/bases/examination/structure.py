"""Checks of the configurations of a base's parts: they can be distilled, and fit one another and the weights.

Modules are built on torch's meta device: no weights, no memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig
from lcmlora.bases.examination.weightfiles import Entry, first_names
from lcmlora.errors import UserError
from lcmlora.io.terminal import joined

if TYPE_CHECKING:
    from torch import nn

Shapes = dict[str, tuple[int, ...]]  # of a part's weights, by name

_MAX_BLOCKS = 1024  # transformers and resnets; SDXL has some 100. More take minutes to build, even without memory
_MAX_TEXT_LAYERS = 128  # the largest published text encoder has 32
_MAX_INTEGER = 1 << 24
_MAX_TIMESTEPS = 100_000
# Keys that a UNet's configuration sets if the UNet takes inputs that a text-to-image base does not have.
_FOREIGN_INPUTS = {
    "time_cond_proj_dim": "an embedding of the guidance scale, as guided LCMs do: the base is distilled already",
    "encoder_hid_dim": "another projection of its text or picture embeddings",
    "class_embed_type": "class labels, as upscalers do",
    "num_class_embeds": "class labels, as upscalers do",
}
# Older names of attention layers, which diffusers renames when it loads a file.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Tensors of a whole CLIP that are not its text encoder's.
_OTHER_CLIP_TENSORS = ("vision_model.", "visual_projection.", "logit_scale", "text_projection.")


class TextConfig(NamedTuple):
    """The configuration of a CLIP text encoder, as transformers reads it."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    projection_dim: int
    eos_token_id: object  # a token id in a sound configuration


def check_unet(config: LibraryConfig) -> None:
    """Raises UserError if a UNet's configuration is not that of a text-to-image base."""
    check_class(config, "UNet2DConditionModel")
    for key, meaning in _FOREIGN_INPUTS.items():
        if config.get(key) is not None:
            raise UserError(f"{config.place}: {key} is {config[key]!r}: the UNet takes {meaning}; expected none")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(
            f"{config.place}: addition_embed_type is {config['addition_embed_type']!r}; expected null, or text_time "
            "for SDXL"
        )


def check_class(config: LibraryConfig, expected: str) -> None:
    """Raises UserError if a configuration of diffusers is of another class, is quantised, or has absurd sizes."""
    if (actual := config.get("_class_name", expected)) != expected:
        raise UserError(f"{config.place}: _class_name is {str(actual)[:100]!r}; expected {expected}")
    _check_plain(config)
    layers = _largest_integer(config.get("layers_per_block", 2))
    depths = [_largest_integer(config.get(f"{side}transformer_layers_per_block") or 1) for side in ("", "reverse_")]
    channels = config.get("block_out_channels", [1, 1, 1, 1])
    if not isinstance(channels, list) or not 1 <= len(channels) <= 16:
        raise UserError(
            f"{config.place}: block_out_channels: expected a list of the blocks' channels, got {str(channels)[:60]}"
        )
    if len(channels) * (layers + 1) * max(depths) > _MAX_BLOCKS:
        raise UserError(
            f"{config.place}: layers_per_block and transformer_layers_per_block make over {_MAX_BLOCKS} layers"
        )


def _check_plain(config: LibraryConfig) -> None:
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{config.place}: quantization_config is set: quantised weights are not distilled; get the plain base"
        )
    for key, value in _leaves(config):
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise UserError(f"{config.place}: {key} is {str(value)[:30]}; expected at most {_MAX_INTEGER}")


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yields every value that is no object and no list, with the key that it is below."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _largest_integer(value: object) -> int:
    """Returns the largest integer in an integer, a list or a list of lists; 1 if there is none."""
    return max((int(leaf) for _, leaf in _leaves(value) if isinstance(leaf, int)), default=1)


def check_latents(unet: LibraryConfig, vae: LibraryConfig) -> None:
    """Raises UserError if the UNet or the VAE needs latents other than those of plain Stable Diffusion."""
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise UserError(f"{vae.place}: {key} is set, and latents are only ever scaled here, by one number")
    scale = vae.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise UserError(f"{vae.place}: scaling_factor is {scale!r}; expected a positive number")
    inputs, outputs, latent = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
    if inputs != latent:
        raise UserError(
            f"{unet.place}: in_channels is {inputs} and the VAE's latents have {latent}; expected a text-to-image "
            "base, not one for inpainting or editing"
        )
    if outputs != latent:
        raise UserError(f"{unet.place}: out_channels is {outputs} and the VAE's latents have {latent}")
    for config, channels in ((unet, (inputs, outputs)), (vae, (vae.get("in_channels", 3),))):
        sizes = (*channels, config.get("sample_size", 1) or 1)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UserError(f"{config.place}: channels and sample_size: expected whole numbers above 0")


def diffusers_shapes(config: LibraryConfig, class_name: str) -> Shapes:
    """Returns the shapes of the weights of a UNet2DConditionModel or AutoencoderKL with this configuration.

    Raises:
        UserError: diffusers cannot build one from it.
    """
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    cls = getattr(diffusers, class_name)
    return _shapes(config.place, class_name, lambda: cls.from_config(config))


def read_text_config(part: Path, *, penultimate: bool = False) -> TextConfig:
    """Returns the configuration of a CLIP text encoder.

    Args:
        part: the text encoder's folder.
        penultimate: the base reads the output of the encoder's last layer but one.

    Raises:
        UserError: the encoder is not CLIP's, or its configuration has a value that none can have.
    """
    from transformers import CLIPTextConfig

    config = LibraryConfig.read(part / "config.json")
    model_type = config.get("model_type", "clip_text_model")
    if model_type not in ("clip", "clip_text_model"):
        raise UserError(f"{config.place}: model_type is {str(model_type)[:100]!r}; expected a text encoder of CLIP")
    _check_plain(config)
    try:
        values = CLIPTextConfig.from_pretrained(part, local_files_only=True).to_dict()
    except Exception as error:  # of a foreign value, whatever it leads to
        raise UserError(f"{config.place}: transformers cannot read it: {_one_line(error)}") from error
    integers = {}
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "projection_dim"):
        value = values.get(key)
        if type(value) is not int or not 0 < value <= _MAX_INTEGER:
            raise UserError(f"{config.place}: {key} is {str(value)[:60]}; expected a whole number above 0")
        integers[key] = value
    text = TextConfig(**integers, eos_token_id=values.get("eos_token_id", 2))
    if text.num_hidden_layers > _MAX_TEXT_LAYERS:
        raise UserError(
            f"{config.place}: num_hidden_layers is {text.num_hidden_layers}; expected at most {_MAX_TEXT_LAYERS}"
        )
    if penultimate and text.num_hidden_layers < 2:
        raise UserError(f"{config.place}: num_hidden_layers is 1, and SDXL reads the layer before the last")
    return text


def text_shapes(part: Path, class_name: str) -> Shapes:
    """Returns the shapes of the weights of a CLIP text encoder of this class, by names without `text_model.`.

    Raises:
        UserError: transformers cannot build one from its configuration.
    """
    import transformers
    from transformers import CLIPTextConfig

    cls = getattr(transformers, class_name)
    shapes = _shapes(
        str(part / "config.json"),
        class_name,
        lambda: cls(CLIPTextConfig.from_pretrained(part, local_files_only=True)),
    )
    return {name.removeprefix("text_model."): shape for name, shape in shapes.items()}


def _shapes(place: str, class_name: str, build: Callable[[], nn.Module]) -> Shapes:
    import torch

    with torch.device("meta"):
        try:
            module = build()
        except Exception as error:  # of a foreign configuration, whatever it leads to
            raise UserError(f"{place}: no {class_name} can be built from it: {_one_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_weights(part: Path, shapes: Shapes, entries: Mapping[str, Entry], *, text: bool) -> None:
    """Raises UserError if a part's files lack weights, or have weights or shapes that its configuration does not.

    Args:
        part: the part's folder, for errors.
        shapes: the shapes of the weights by the configuration.
        entries: the tensors of the part's files.
        text: the part is a text encoder.
    """
    actual = {_current_name(name, shapes, text): entry for name, entry in entries.items()}
    if text:
        actual = {name: entry for name, entry in actual.items() if name in shapes or not _is_beside_text(name)}
    missing, extra = sorted(shapes.keys() - actual.keys()), sorted(actual.keys() - shapes.keys())
    if missing:
        raise UserError(
            f"{part}: lacks {_count(missing)} of its configuration: {first_names(missing)}; get the base again"
        )
    if extra:
        raise UserError(
            f"{part}: has {_count(extra)} that its config.json has no place for: {first_names(extra)}; the "
            "configuration is that of another architecture"
        )
    for name, shape in shapes.items():
        if actual[name].shape != shape:
            raise UserError(f"{part}: {name} has shape {actual[name].shape}, and by its config.json {shape}")


def _current_name(name: str, shapes: Shapes, text: bool) -> str:
    """Returns a tensor's name as the libraries' present versions have it."""
    if text:
        return name.removeprefix("text_model.")
    if name not in shapes:
        path, _, kind = name.rpartition(".")
        before, _, last = path.rpartition(".")
        if (current := f"{before}.{_OLD_ATTENTION.get(last, last)}.{kind}") in shapes:
            return current
    return name


def _is_beside_text(name: str) -> bool:
    return name.startswith(_OTHER_CLIP_TENSORS) or name.endswith("position_ids")


def examine_schedule(path: Path) -> DigestInput:
    """Returns the settings of a scheduler_config.json, whatever its class, that decide a base's noise schedule.

    Settings that the file lacks have diffusers' defaults.

    Raises:
        UserError: the schedule is not made of betas, or it predicts epsilon and ends in pure noise.
    """
    from diffusers import DDIMScheduler

    config = LibraryConfig.read(path)
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise UserError(
            f"{path}: {str(config.get('_class_name', 'the scheduler'))[:100]} has no beta_schedule; expected a "
            "diffusion base (epsilon, v_prediction or sample), not one trained by flow matching or with EDM's noise "
            "levels"
        )
    count, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if type(count) is not int or not 2 <= count <= _MAX_TIMESTEPS:
        raise UserError(f"{path}: num_train_timesteps is {str(count)[:60]}; expected 2 to {_MAX_TIMESTEPS}")
    if betas is not None and (not isinstance(betas, list) or len(betas) != count):
        raise UserError(f"{path}: trained_betas: expected a list of num_train_timesteps numbers ({count})")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{path}: prediction_type is {str(prediction_type)[:60]!r}; expected epsilon, v_prediction or sample"
        )
    try:
        scheduler = DDIMScheduler.from_config(config)
        alphas = scheduler.alphas_cumprod.double()
        falling = bool((alphas.diff() < 0).all() and (alphas >= 0).all() and (alphas <= 1).all())
    except Exception as error:  # of a foreign configuration, whatever it leads to
        raise UserError(f"{path}: diffusers cannot make a schedule of it: {_one_line(error)}") from error
    if not falling:
        raise UserError(f"{path}: its betas are no schedule: alphas_cumprod does not fall from 1 towards 0")
    if prediction_type == "epsilon" and float(alphas[-1]) == 0:
        # x0 = (x - sigma eps) / alpha (arXiv 2305.08891, section 3.3): a division by zero at T - 1.
        raise UserError(
            f"{path}: prediction_type is epsilon and the schedule ends in pure noise (rescale_betas_zero_snr), where "
            "epsilon cannot give x0; set prediction_type to what the base was trained for, which is v_prediction for "
            "such a schedule, or rescale_betas_zero_snr to false"
        )
    return {key: value for key, value in dict(scheduler.config).items() if key in _SCHEDULE_KEYS}


# The settings of DDIMScheduler, which the schedulers of releases and solvers get too.
_SCHEDULE_KEYS = frozenset(
    (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", "clip_sample_range", "thresholding"),
        *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset"),
    )
)


def _count(names: list[str]) -> str:
    return "a tensor" if len(names) == 1 else f"{len(names)} tensors"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {joined(error, 200)}"
