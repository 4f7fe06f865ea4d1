"""CLIP models in miniature: real ones with random weights, and a tokenizer of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

_SIDE = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_clip(folder: Path, *, seed: int = 0) -> CLIPModel:
    """Writes the folder in transformers' layout and returns the model; the same weights for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 12} | ends
    vision = {"hidden_size": 24, "intermediate_size": 32, "image_size": _SIDE, "patch_size": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text | layers, vision_config=vision | layers, projection_dim=12)).eval()
    model.save_pretrained(folder)
    square = {"height": _SIDE, "width": _SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=square).save_pretrained(folder)
    return model
