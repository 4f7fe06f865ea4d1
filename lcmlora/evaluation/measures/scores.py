"""Scores of single pictures by their prompts, from networks of others: text alignment and human preference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcmlora import extras
from lcmlora.errors import UserError
from lcmlora.evaluation.measures.clip import Clip, download
from lcmlora.io.files import sha256_file
from lcmlora.plugins import SCORES

_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."  # where ImageReward's weights are in its file
_NAMES = {  # of its picture tower, in transformers
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed.proj": "embeddings.patch_embedding",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
}


class Scorer(Protocol):
    """A frozen network that judges a picture. The name says which network, with which weights.

    Its class takes the device, and where the weights are or None (evaluation.scores_source).
    """

    name: str

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of any size and a prompt for each -> (B,) fp32; more is better."""
        ...


def load(name: str, device: torch.device, source: str | None = None) -> Scorer:
    """Returns the scorer of this name.

    What another package adds may be a class, as those here, or a plain function of pictures and prompts that returns a
    number for each picture.

    Args:
        source: where the weights are; None is the makers' own on the hub. `clip-score`: a folder in transformers'
            layout, or a hub id with its commit, `OWNER/NAME@COMMIT`. `image-reward`: a folder with ImageReward.pt and
            the vocab.txt of bert-base-uncased. `hps`: a file of HPSv2's, or a folder in open_clip's layout.

    Raises:
        UserError: an unknown scorer, a package that is missing, or weights that are not there or are of something else.
    """
    added = SCORES.get(name)
    if isinstance(added, type):
        scorer: Scorer = added(device, source)
        return scorer
    if source is not None:
        raise UserError(f"evaluation.scores_source: {name} is a function, which takes no weights; remove {source}")
    return _Function(name, added)


class _Function:
    """A scorer that is a plain function, such as an entry point of another package."""

    def __init__(self, name: str, function: Callable[[Tensor, Sequence[str]], Tensor | Sequence[float]]) -> None:
        self.name = name
        self._function = function

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        _one_for_each(pictures, prompts)
        scores = torch.as_tensor(self._function(pictures, prompts), dtype=torch.float32)
        if scores.shape != (len(pictures),):
            raise UserError(
                f"evaluation.scores: {self.name} returned {list(scores.shape)} for {len(pictures)} pictures; expected "
                "one number for each"
            )
        return scores


class ClipScore:
    """100 times the cosine of CLIP's embeddings of picture and prompt, 0 where it is negative.

    As torchmetrics has it; arXiv 2104.08718 has 2.5 instead of 100, and a prefix to the prompt. ViT-L/14 at 224 px.
    """

    _SOURCE = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        self._clip = Clip(source or self._SOURCE, "evaluation.scores_source", device)
        self.name = f"clip-score/{self._clip.name}"

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        _one_for_each(pictures, prompts)
        return 100 * (self._clip.pictures(pictures) * self._clip.texts(prompts)).sum(dim=1).clamp(min=0)


class ImageReward:
    """ImageReward v1.0 (arXiv 2304.05977): BLIP with a small head, trained on human rankings. About N(0, 1).

    The makers' package does not import with transformers 5, so their weights are read into its BLIP, whose layers are
    the same under other names.
    """

    _SOURCE = ("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
    _VOCABULARY = ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
    _SIDE = 224
    _TOKENS = 35  # of a prompt, what is longer is cut off; this and the next two are the makers'
    _MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the head's outputs in training

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        setting = "evaluation.scores_source"
        if source is None:
            weights = download(*self._SOURCE, ["ImageReward.pt"], setting) / "ImageReward.pt"
            vocabulary = download(*self._VOCABULARY, ["vocab.txt"], setting) / "vocab.txt"
        else:
            weights, vocabulary = Path(source) / "ImageReward.pt", Path(source) / "vocab.txt"
        for file in (weights, vocabulary):
            if not file.is_file():
                raise UserError(f"{setting}: image-reward needs a folder with {file.name}, and {file} is missing")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            vision = BlipVisionConfig(**_vision_shape(state), image_size=self._SIDE, layer_norm_eps=1e-6)
            text = BlipTextConfig(**_text_shape(state), encoder_hidden_size=vision.hidden_size)
            self._vision, self._text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
            self._vision.load_state_dict(_renamed(state, _VISION))
            # 0, 1, 2, ..., which transformers no longer keeps with the weights.
            encoder = _renamed(state, _TEXT)
            encoder.pop("embeddings.position_ids", None)
            self._text.load_state_dict(encoder)
            self._head = _head(_renamed(state, "mlp.layers."))
        except Exception as error:  # whatever torch.load and load_state_dict make of another file
            reason = str(error).partition("\n")[0]
            raise UserError(f"{weights}: these are not ImageReward's weights: {reason}") from error
        for part in (self._vision, self._text, self._head):
            part.to(device).eval().requires_grad_(False)
        self._tokenizer = BertTokenizer(str(vocabulary))
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        self._device = device
        self.name = f"image-reward/v1.0@{sha256_file(weights)[:12]}"

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        _one_for_each(pictures, prompts)
        x = F.interpolate(
            pictures.to(self._device, torch.float32), (self._SIDE, self._SIDE), mode="bicubic", antialias=True
        )
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._TOKENS, return_tensors="pt"
        ).to(self._device)
        return self._rewards((x.clamp(0, 1) - self._mean) / self._std, tokens["input_ids"], tokens["attention_mask"])

    @torch.no_grad()
    def _rewards(self, pictures: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self._vision(pictures).last_hidden_state
        read = self._text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device),
        ).last_hidden_state[:, 0]
        return (self._head(read).squeeze(1) - self._MEAN) / self._DEVIATION


def _renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the part of the makers' weights below `prefix`, by transformers' names."""
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if prefix != _VISION:
        return part
    for pattern, replacement in _NAMES.items():
        part = {re.sub(pattern, replacement, name): value for name, value in part.items()}
    return part


def _vision_shape(state: dict[str, Tensor]) -> dict[str, int]:
    embedding = state[f"{_VISION}patch_embed.proj.weight"]
    return _tower(embedding.shape[0], state[f"{_VISION}blocks.0.mlp.fc1.weight"], state, f"{_VISION}blocks.") | {
        "patch_size": embedding.shape[2]
    }


def _text_shape(state: dict[str, Tensor]) -> dict[str, int]:
    words = state[f"{_TEXT}embeddings.word_embeddings.weight"]
    layers = f"{_TEXT}encoder.layer."
    return _tower(words.shape[1], state[f"{layers}0.intermediate.dense.weight"], state, layers) | {
        "vocab_size": words.shape[0]
    }


def _tower(width: int, widest: Tensor, state: dict[str, Tensor], layers: str) -> dict[str, int]:
    indices = {name.removeprefix(layers).partition(".")[0] for name in state if name.startswith(layers)}
    return {
        "hidden_size": width,
        "intermediate_size": widest.shape[0],
        "num_hidden_layers": len(indices),
        "num_attention_heads": width // 64,  # in both towers
    }


def _head(state: dict[str, Tensor]) -> nn.Sequential:
    """Returns the linear layers; between them is dropout, which is over after training, and nothing else."""
    layers = []
    for index in sorted({int(name.partition(".")[0]) for name in state}):
        weight, bias = state[f"{index}.weight"], state[f"{index}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


class Hps:
    """HPS v2.1 (arXiv 2306.09341): CLIP ViT-H/14 trained on human choices. 100 times the cosine, some 20 to 35."""

    _SOURCE = ("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
    _FILE = "HPS_v2.1_compressed.pt"

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        extras.require("open_clip", extra="scores", needed_by="evaluation.scores: hps")
        try:
            import open_clip
        except (ImportError, RuntimeError) as error:  # by a torchvision that is not for this torch
            raise UserError(f"evaluation.scores: hps: {error}; try pip install 'lcmlora[scores]'") from error
        setting = "evaluation.scores_source"
        place = download(*self._SOURCE, [self._FILE], setting) / self._FILE if source is None else Path(source)
        if not place.exists():
            raise UserError(f"{setting}: hps needs a file of HPSv2's weights, and {place} is missing")
        shape = "ViT-H-14" if place.is_file() else f"local-dir:{place}"
        try:
            model = open_clip.create_model(shape, pretrained=str(place) if place.is_file() else None, device="cpu")
            self._tokenizer = open_clip.get_tokenizer(shape)
        except Exception as error:  # whatever open_clip makes of another file
            reason = str(error).partition("\n")[0]
            raise UserError(f"{place}: these are not weights of a CLIP model of open_clip: {reason}") from error
        self._model = model.to(device).eval().requires_grad_(False)
        trained_on = open_clip.get_model_preprocess_cfg(model)
        self._mean, self._std = (
            torch.tensor(trained_on[name], device=device)[:, None, None] for name in ("mean", "std")
        )
        self._device = device
        file = place if place.is_file() else next(p for p in sorted(place.glob("open_clip_*")) if p.suffix != ".json")
        self.name = f"hps/{'v2.1' if place.name == self._FILE else place.stem}@{sha256_file(file)[:12]}"

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        _one_for_each(pictures, prompts)
        side = self._model.visual.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        x = F.interpolate(pictures.to(self._device, torch.float32), size, mode="bicubic", antialias=True)
        seen = self._model.encode_image((x.clamp(0, 1) - self._mean) / self._std, normalize=True)
        read = self._model.encode_text(self._tokenizer(list(prompts)).to(self._device), normalize=True)
        return 100 * (seen * read).sum(dim=1)


def _one_for_each(pictures: Tensor, prompts: Sequence[str]) -> None:
    if len(pictures) != len(prompts):
        raise ValueError(f"one prompt for each picture: {len(pictures)} pictures with {len(prompts)}")
