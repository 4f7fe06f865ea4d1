"""The names of an adapter's tensors: the layer and the factor in a name, or the model or kind that it belongs to.

A name is a prefix, a layer and a factor, each in the spelling of one of many programs:

unet., lora_unet_, lora_unet., diffusion_model., base_model.model., lycoris_   prefixes, at times several in a row
down_blocks.1.attentions.0.proj_in, down_blocks_1_attentions_0_proj_in         diffusers' name of the layer
input_blocks.4.1.proj_in, input_blocks_4_1_proj_in                             the original code's name
lora_down.weight, lora_A.weight, lora_A.NAME.weight, lora.down.weight          factors
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lcmlora.io import terminal

DOWN, UP, ALPHA = "down", "up", "alpha"
LONGEST = 300  # characters of a name; the longest of SDXL's has 110

_PREFIX = re.compile(r"(base_model\.model\.|(model\.)?diffusion_model\.|unet\.|lora_unet[._]|lycoris[._])*")
# Of kohya; of PEFT, with or without an adapter's name; of diffusers before 0.26, whose attention had processors; of
# diffusers' other layers; alpha.
_FACTORS = (
    re.compile(r"(?P<layer>.+)\.lora_(?P<part>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(\.[\w-]+)?\.weight"),
    re.compile(r"(?P<layer>.+)\.processor(?P<attention>\.to_(q|k|v|out))_lora\.(?P<part>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora(_linear_layer)?\.(?P<part>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<part>alpha)"),
)
_PARTS = {"A": DOWN, "B": UP}
# kohya, OneTrainer, PEFT and diffusers, ComfyUI, the original code.
_TEXT = re.compile(
    r"(base_model\.model\.|lycoris_)*(lora_te\d?[._]|te\d?[._]|text_encoders?(_\d)?\.|lora_text_encoder|text_model\."
    r"|clip_[lgh]\.|t5xxl\.|cond_stage_model\..*lora|conditioner\..*lora)"
)
_EMBEDDING = re.compile(r"bundle_emb\.|(clip_[lg]|emb_params|string_to_param)$")

# diffusers' names of the layers of Stable Diffusion's UNets.
_DIFFUSERS = re.compile(
    r"((down|up)_blocks\.\d+|mid_block)\.("
    r"attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
    r"|resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|(down|up)samplers\.\d+\.conv)"
    r"|conv_in|conv_out|(time|add|class)_embedding\.linear_[12]"
)

# Other kinds of adapters by the ends of their tensors' names: LyCORIS (lycoris/modules), PEFT (peft/tuners).
_KINDS = (
    (r"\.hada_[wt]\d", "LoHa"),
    (r"\.lokr_[wt]\d", "LoKr"),
    (r"\.lora_mid\.", "LoCon with lora_mid, a Tucker (CP) decomposition of convolutions"),
    (r"\.dora_scale|\.lora_magnitude_vector|\.magnitude$", "DoRA"),
    (r"\.on_input$|\.ia3_l", "(IA)3"),
    (r"\.diff(_[bm])?$|\.set_weight$", "full weight differences"),
    (r"\.[wb]_norm$", "trained normalisation layers"),
    (r"\.b?oft_", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.vera_", "VeRA"),
    (r"\.lora_E(\.|$)|\.lora_[AB](\.\w+)?$", "AdaLoRA"),
    (r"\.lora_embedding_[AB]", "LoRA of embeddings"),
    (r"\.(scalar|rescale)$", "LyCORIS with a scalar for each layer"),
    (r"\.lora_(B|up)(\.\w+)?\.bias$", "LoRA with biases"),
)

# Other models by the beginning of their layers' names, with underscores for dots. The first that
# matches a layer counts.
_MODELS = (
    (r"(lora_)?prior_unet|(down|up)_blocks_\d+_\d+_|(effnet|clip_txt)\w*mapper", "Stable Cascade"),
    (r"\w*motion_modules|\w*temporal_transformer_(?!blocks)", "AnimateDiff"),
    (r"\w*(temporal_transformer_blocks|spatial_res_block|time_stack)", "Stable Video Diffusion"),
    (r"(lora_)?(controlnet|control_model|control_lora)|\w*(zero_convs|input_hint_block)", "a ControlNet"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"\w*token_refiner", "HunyuanVideo"),
    (r"(single|double)_blocks_\d|single_transformer_blocks_\d", "Flux, or of a model built like it (Chroma, Hunyuan)"),
    (r"transformer_blocks_\d+_(img|txt)_m", "Qwen-Image"),
    (r"joint_blocks_\d|transformer_blocks_\d+_(attn_(add_|to_add)|ff_context)", "Stable Diffusion 3"),
    (r"joint_transformer_blocks_\d|(double|single)_layers_\d", "AuraFlow"),
    (r"transformer_blocks_\d+_attn_", "Stable Diffusion 3 or Flux"),
    (r"(transformer_blocks_\d+|caption_projection|adaln_single)_", "PixArt, Sana, LTX-Video or CogVideoX"),
    (r"blocks_\d+_(attn[12]_(Wqkv|q_proj|kv_proj|out_proj)|default_modulation)", "Hunyuan-DiT"),
    (r"blocks_\d+_(attn_(qkv|proj)|cross_attn_(q|kv)_linear)", "PixArt"),
    (r"blocks_\d+_(self_attn|cross_attn|ffn|attn[12])_", "Wan, or of a model built like it (Cosmos)"),
    (r"(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN)", "Lumina or Z-Image"),
    (r"(layers|h)_\d+_(self_attn|attn|mlp|self_attention)_", "a language model"),
    (
        r"(down|up)_blocks_\d+_attentions_\d+_(to_|add_)|mid_block_attentions_\d+_(to_|add_)",
        "Kandinsky or DeepFloyd IF",
    ),
    (r"image_proj|ip_adapter|\w*to_[kv]_ip", "an IP-Adapter"),
    (r"(double|single)_stream_blocks_\d", "HiDream"),
    (r"(first_stage_model|vae)_|(encoder|decoder)_(down|up|mid|conv)", "a VAE"),
)
_OF_ANY_MODEL = re.compile(
    r"(base_model\.model\.|(model\.)?diffusion_model\.|unet\.|lora_unet[._]|lycoris[._]|lora_transformer[._]"
    r"|transformer\.|lora_(?=\w*blocks)|model\.)*"
)
_WHOLE = re.compile(
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.|.*_blocks?\..+\.(weight|bias)$"
)


@dataclass(frozen=True)
class Name:
    """A tensor's name, parsed."""

    layer: str  # in the file's spelling, without a prefix
    part: str  # DOWN, UP or ALPHA

    @property
    def is_diffusers(self) -> bool:
        """Whether the layer has diffusers' name of its module, so that no base is needed to find the module."""
        return _DIFFUSERS.fullmatch(self.layer) is not None


def parse(name: str) -> Name | None:
    """Returns the layer and the part in the name of a plain LoRA's tensor; None if it is not a plain LoRA's."""
    if len(name) > LONGEST or not name.isprintable():
        return None
    rest = name[_prefix(_PREFIX, name) :]
    for pattern in _FACTORS:
        if match := pattern.fullmatch(rest):
            groups = match.groupdict()
            layer = groups["layer"] + (groups.get("attention") or "")
            if layer.endswith(".to_out"):
                layer += ".0"
            return Name(layer, _PARTS.get(groups["part"], groups["part"]))
    return None


def of_text_encoder(name: str) -> bool:
    """Returns whether a tensor is for a text encoder."""
    return _TEXT.match(name[:LONGEST]) is not None


def is_embedding(name: str) -> bool:
    """Returns whether a tensor is the embedding of a trained token, which trainers write into an adapter's file."""
    return _EMBEDDING.match(name[:LONGEST]) is not None


def foreign_model(names: Iterable[str]) -> str | None:
    """Returns the model that has these layers, if it is known and not Stable Diffusion's UNet; else None."""
    flat = {name[_prefix(_OF_ANY_MODEL, name) : LONGEST].replace(".", "_") for name in names}
    for pattern, model in _MODELS:
        if any(re.match(pattern, name) for name in flat):
            return model
    return None


def explain(name: str, names: Iterable[str]) -> str:
    """Returns why a name is not a plain LoRA's, for an error.

    Args:
        names: all names of the file.
    """
    if is_embedding(name):
        return "it is the embedding of a trained token (textual inversion), not of a UNet"
    if kind := next((kind for pattern, kind in _KINDS if re.search(pattern, name[-LONGEST:])), None):
        return f"it is one of {kind}, and other kinds than plain LoRA are not supported"
    names = list(names)
    if not any("lora" in each.lower() for each in names) and _WHOLE.match(name[:LONGEST]):
        return "the file has a model's whole weights, and is no adapter"
    if model := foreign_model(names):
        return f"its layers are those of {model}, and other models are not supported"
    return "its spelling is not known: expected names as diffusers, PEFT, kohya, OneTrainer or ComfyUI write them"


def shown(name: str) -> str:
    """Returns a tensor's or a layer's name as errors show it."""
    return terminal.shown(name, LONGEST)


def _prefix(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.match(name)
    return match.end() if match else 0
