"""Whether the configurations of a base's parts are ones that can be distilled, and fit one another and the weights.

Modules are built on torch's meta device: no weights, no memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcmlora.bases.examination.weightfiles import Entry, json_of, some
from lcmlora.errors import UserError
from lcmlora.io.terminal import joined

Shapes = dict[str, tuple[int, ...]]

_BLOCKS = 1024  # of transformers and resnets; SDXL has some 100. More take minutes to build, even without memory
_LAYERS = 128  # of a text encoder; the largest published has 32
_INTEGER = 1 << 24
_TIMESTEPS = 100_000
# What a UNet's configuration sets where it wants inputs that text-to-image bases are not given.
_FOREIGN_INPUTS = {
    "time_cond_proj_dim": "an embedding of the guidance scale, as guided LCMs are: the base is distilled already",
    "encoder_hid_dim": "another projection of its text or picture embeddings",
    "class_embed_type": "class labels, as upscalers are",
    "num_class_embeds": "class labels, as upscalers are",
}
# Diffusers renames these when it loads a file from before its attention blocks had the present names.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# A file of the whole CLIP has these besides the text encoder.
_BESIDE_TEXT = ("vision_model.", "visual_projection.", "logit_scale", "text_projection.")


def check_unet(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError where a UNet's configuration is not that of a text-to-image base."""
    check_class(path, config, "UNet2DConditionModel")
    for key, meaning in _FOREIGN_INPUTS.items():
        if config.get(key) is not None:
            raise UserError(f"{path}: {key} is {config[key]!r}: the UNet wants {meaning}; expected none")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(
            f"{path}: addition_embed_type is {config['addition_embed_type']!r}; expected null, or text_time for SDXL"
        )


def check_class(path: Path, config: dict[str, Any], expected: str) -> None:
    """Raises UserError where a configuration is of another class, is quantised, or has sizes out of all reason."""
    if (found := config.get("_class_name", expected)) != expected:
        raise UserError(f"{path}: _class_name is {str(found)[:100]!r}; expected {expected}")
    if config.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config is set: quantised weights are not distilled; get the plain base")
    for key, value in _leaves(config):
        if isinstance(value, int) and abs(value) > _INTEGER:
            raise UserError(f"{path}: {key} is {str(value)[:30]}, out of all reason")
    layers = _most(config.get("layers_per_block", 2))
    depths = [_most(config.get(f"{side}transformer_layers_per_block") or 1) for side in ("", "reverse_")]
    outs = config.get("block_out_channels", [1, 1, 1, 1])
    if not isinstance(outs, list) or not 1 <= len(outs) <= 16:
        raise UserError(f"{path}: block_out_channels: expected a list of the blocks' channels, got {str(outs)[:60]}")
    if len(outs) * (layers + 1) * max(depths) > _BLOCKS:
        raise UserError(f"{path}: layers_per_block and transformer_layers_per_block make over {_BLOCKS} layers")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _most(value: Any) -> int:
    """Returns the largest number in a number, or list, or list of lists; 1 of what is none."""
    return max((int(leaf) for _, leaf in _leaves(value) if isinstance(leaf, int)), default=1)


def check_latents(folder: Path, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raises UserError where the UNet or the VAE wants of its latents what plain Stable Diffusion does not give."""
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise UserError(
                f"{folder}/vae/config.json: {key} is set, and latents are only ever scaled here, by one number"
            )
    scale = vae.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise UserError(f"{folder}/vae/config.json: scaling_factor is {scale!r}; expected a positive number")
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent:
        raise UserError(
            f"{folder}/unet/config.json: in_channels is {channels} and the VAE's latents have {latent}; expected a "
            "text-to-image base, not one for inpainting or editing"
        )
    if (out := unet.get("out_channels", 4)) != latent:
        raise UserError(f"{folder}/unet/config.json: out_channels is {out} and the VAE's latents have {latent}")
    for part, config, sides in (("unet", unet, (channels, out)), ("vae", vae, (vae.get("in_channels", 3),))):
        if not all(isinstance(side, int) and side > 0 for side in (*sides, config.get("sample_size", 1) or 1)):
            raise UserError(f"{folder}/{part}/config.json: channels and sample_size: expected whole numbers above 0")


def diffusers_shapes(path: Path, config: dict[str, Any], kind: str) -> Shapes:
    """Returns the shapes of the weights of a UNet2DConditionModel or AutoencoderKL with this configuration."""
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    cls = getattr(diffusers, kind)
    return _shapes(path, kind, lambda: cls.from_config(config))


def text_config(folder: Path, part: str, *, penultimate: bool = False) -> dict[str, Any]:
    """Returns the configuration of a CLIP text encoder as transformers reads it. Raises UserError.

    Args:
        penultimate: the layer before the last is read.
    """
    from transformers import CLIPTextConfig

    path = folder / part / "config.json"
    raw = json_of(path)
    kind = raw.get("model_type", "clip_text_model")
    if kind not in ("clip", "clip_text_model"):
        raise UserError(f"{path}: model_type is {str(kind)[:100]!r}; expected a text encoder of CLIP")
    check_class(path, raw | {"block_out_channels": [1]}, raw.get("_class_name", ""))
    try:
        config = dict(CLIPTextConfig.from_pretrained(folder / part, local_files_only=True).to_dict())
    except Exception as error:  # of a foreign value, whatever it leads to
        raise UserError(f"{path}: transformers cannot read it: {_line(error)}") from error
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "projection_dim"):
        if type(config.get(key)) is not int or not 0 < config[key] <= _INTEGER:
            raise UserError(f"{path}: {key} is {str(config.get(key))[:60]}; expected a whole number above 0")
    if config["num_hidden_layers"] > _LAYERS:
        raise UserError(f"{path}: num_hidden_layers is {config['num_hidden_layers']}; expected at most {_LAYERS}")
    if penultimate and config["num_hidden_layers"] < 2:
        raise UserError(f"{path}: num_hidden_layers is 1, and SDXL reads the layer before the last")
    return config


def text_shapes(folder: Path, part: str, kind: str) -> Shapes:
    """Returns the shapes of the weights of a CLIP text encoder of this class, by names without `text_model.`."""
    import transformers
    from transformers import CLIPTextConfig

    cls = getattr(transformers, kind)
    path = folder / part / "config.json"
    shapes = _shapes(path, kind, lambda: cls(CLIPTextConfig.from_pretrained(folder / part, local_files_only=True)))
    return {name.removeprefix("text_model."): shape for name, shape in shapes.items()}


def _shapes(path: Path, kind: str, build: Any) -> Shapes:
    import torch

    with torch.device("meta"):
        try:
            module = build()
        except Exception as error:  # of a foreign configuration, whatever it leads to
            raise UserError(f"{path}: no {kind} can be built from it: {_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_weights(part: Path, shapes: Shapes, held: dict[str, Entry], *, text: bool) -> None:
    """Raises UserError where a part's files lack weights of its configuration, or have others, or other shapes.

    Args:
        part: its folder, for messages.
        shapes: by its configuration.
        held: the tensors of its files.
        text: the part is a text encoder.
    """
    found = {_present_name(name, shapes, text): entry for name, entry in held.items()}
    if text:
        found = {name: e for name, e in found.items() if name in shapes or not _beside_text(name)}
    lost, more = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if lost:
        raise UserError(f"{part}: lacks {_count(lost)} of its configuration: {some(lost)}; get the base again")
    if more:
        raise UserError(
            f"{part}: has {_count(more)} that its config.json has no place for: {some(more)}; the configuration is "
            "that of another architecture"
        )
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(f"{part}: {name} has shape {found[name].shape}, and by its config.json {shape}")


def _present_name(name: str, shapes: Shapes, text: bool) -> str:
    if text:
        return name.removeprefix("text_model.")
    if name not in shapes:
        path, _, kind = name.rpartition(".")
        before, _, last = path.rpartition(".")
        if (present := f"{before}.{_OLD_ATTENTION.get(last, last)}.{kind}") in shapes:
            return present
    return name


def _beside_text(name: str) -> bool:
    return name.startswith(_BESIDE_TEXT) or name.endswith("position_ids")


def schedule(path: Path) -> dict[str, Any]:
    """Returns what a scheduler's configuration decides, with diffusers' defaults, whatever its class.

    Raises:
        UserError: a schedule that is not made of betas, or at whose end epsilon says nothing of x0.
    """
    from diffusers import DDIMScheduler

    raw = json_of(path)
    if "beta_schedule" not in raw and raw.get("trained_betas") is None:
        raise UserError(
            f"{path}: {str(raw.get('_class_name', 'the scheduler'))[:100]} has no beta_schedule; expected a diffusion "
            "base (epsilon, v_prediction or sample), not one trained by flow matching or with EDM's noise levels"
        )
    count, betas = raw.get("num_train_timesteps", 1000), raw.get("trained_betas")
    if type(count) is not int or not 2 <= count <= _TIMESTEPS:
        raise UserError(f"{path}: num_train_timesteps is {str(count)[:60]}; expected 2 to {_TIMESTEPS}")
    if betas is not None and (not isinstance(betas, list) or len(betas) != count):
        raise UserError(f"{path}: trained_betas: expected a list of num_train_timesteps numbers ({count})")
    if (kind := raw.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{path}: prediction_type is {str(kind)[:60]!r}; expected epsilon, v_prediction or sample")
    try:
        scheduler = DDIMScheduler.from_config(raw)
        alphas = scheduler.alphas_cumprod.double()
        falling = bool((alphas.diff() < 0).all() and (alphas >= 0).all() and (alphas <= 1).all())
    except Exception as error:  # of a foreign configuration, whatever it leads to
        raise UserError(f"{path}: diffusers cannot make a schedule of it: {_line(error)}") from error
    if not falling:
        raise UserError(f"{path}: its betas are no schedule: alphas_cumprod does not fall from 1 towards 0")
    if kind == "epsilon" and float(alphas[-1]) == 0:
        # x0 = (x - sigma eps) / alpha (arXiv 2305.08891, section 3.3): a division by zero at T - 1.
        raise UserError(
            f"{path}: prediction_type is epsilon and the schedule ends in pure noise (rescale_betas_zero_snr), where "
            "epsilon cannot give x0; set prediction_type to what the base was trained for, which is v_prediction for "
            "such a schedule, or rescale_betas_zero_snr to false"
        )
    return {key: value for key, value in dict(scheduler.config).items() if key in _SCHEDULE}


# What DDIMScheduler has, to which the schedulers of a release and of the solvers are set.
_SCHEDULE = frozenset(
    (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", "clip_sample_range", "thresholding"),
        *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset"),
    )
)


def _count(names: list[str]) -> str:
    return "a tensor" if len(names) == 1 else f"{len(names)} tensors"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {joined(error, 200)}"
