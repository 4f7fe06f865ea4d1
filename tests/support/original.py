"""A base folder written as one file in the original layout, as checkpoints are traded: the converse of a conversion.

The names are those of the LDM and SGM code (openaimodel.UNetModel, autoencoder.AutoencoderKL) and of open_clip.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_original(folder: Path, path: Path, marks: tuple[str, ...] = ()) -> Path:
    """Writes the base in `folder` to `path` and returns it; `marks` are names of empty tensors added to it."""
    sdxl = (folder / "text_encoder_2").is_dir()
    clip = _clip(load_file(folder / "text_encoder" / "model.safetensors"))
    parts = {
        "model.diffusion_model.": _unet(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")),
        "first_stage_model.": _vae(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")),
    }
    if sdxl:
        parts["conditioner.embedders.0.transformer."] = clip
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        parts["conditioner.embedders.1.model."] = _open_clip(second)
    elif '"gelu"' in (folder / "text_encoder" / "config.json").read_text():  # SD 2 took open_clip's encoder
        parts["cond_stage_model.model."] = _open_clip(clip)
    else:
        parts["cond_stage_model.transformer."] = clip
    tensors = {prefix + name: t.contiguous() for prefix, part in parts.items() for name, t in part.items()}
    save_file(tensors | {mark: torch.zeros(0) for mark in marks}, path)
    return path


def _unet(state: Tensors, layers: int = 2) -> Tensors:
    """Renames a UNet of `layers` resnets in each down block; blocks are counted through in the original."""

    def place(name: str) -> str:
        if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
            return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
        if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
            attends = any(key.startswith(f"up_blocks.{found[1]}.attentions.") for key in state)
            return f"output_blocks.{int(found[1]) * (layers + 1) + layers}.{1 + attends}.conv.{found[2]}"
        if found := re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", name):
            side, block, kind, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
            attends = kind == "attentions"
            rest = rest if attends else _replaced(rest, _RESNET)
            if side == "mid":
                return f"middle_block.{1 if attends else 2 * layer}.{rest}"
            first = 1 if side == "down" else 0  # input_blocks.0 is conv_in
            blocks = "input_blocks" if side == "down" else "output_blocks"
            return f"{blocks}.{first + block * (layers + 1) + layer}.{int(attends)}.{rest}"
        return _replaced(name, _UNET)

    return {place(name): tensor for name, tensor in state.items()}


def _vae(state: Tensors) -> Tensors:
    """Renames a VAE; its up blocks are counted from the finest in the original, and attention is a 1x1 convolution."""
    blocks = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    renamed = {}
    for name, tensor in state.items():
        new = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}", name)
        new = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"(down|up)samplers\.0\.conv", r"\1sample.conv", new).replace("conv_norm_out", "norm_out")
        if found := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)", new):
            new = f"{found[1]}.mid.attn_1.{_replaced(found[2], _VAE_ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[new] = tensor
    return renamed


def _clip(state: Tensors) -> Tensors:
    return {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _open_clip(state: Tensors) -> Tensors:
    """Renames a CLIP text encoder to open_clip, where queries, keys and values are one matrix."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    tops = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    renamed = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif name in tops:
            renamed[tops[name]] = tensor
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, rest, kind = f"transformer.resblocks.{found[1]}", found[2], found[3]
            if rest == "self_attn.q_proj":
                parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                renamed[f"{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif rest in _OPEN_CLIP:
                renamed[f"{layer}.{_OPEN_CLIP[rest]}.{kind}"] = tensor
    return renamed


def _replaced(name: str, table: dict[str, str]) -> str:
    old = next((old for old in table if name.startswith(old + ".")), None)
    return name if old is None else table[old] + name[len(old) :]
